"""A checkpoint appears whole or not at all: a temporary folder, a manifest of sizes and hashes, one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from megatrain.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2


class FileRecord(NamedTuple):
    """One file of a checkpoint: its path inside it, bytes, and SHA-256."""

    path: str
    size: int
    sha256: str


def record(folder: Path, path: Path) -> FileRecord:
    """Flush the file to disk and describe it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
    return FileRecord(str(path.relative_to(folder)), path.stat().st_size, digest.hexdigest())


def commit(temporary: Path, final: Path, records: list[FileRecord]) -> None:
    """Write the manifest and rename; what stood at `final` before is replaced."""
    write(temporary, records)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync(final.parent)


def write(folder: Path, records: list[FileRecord]) -> None:
    """Write the manifest, and see it on the disk."""
    text = json.dumps({"format": FORMAT, "files": [r._asdict() for r in sorted(records)]}, indent=1)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def sync(path: Path) -> None:
    """See a file, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def problem(folder: Path, *, hashes: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, None when it is whole. Sizes always, hashes on request."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        records = [FileRecord(**entry) for entry in manifest["files"]]
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"has an unreadable {MANIFEST} ({error})"
    if manifest.get("format", 0) > FORMAT:
        return f"is of format {manifest['format']} and this version reads up to {FORMAT}"
    for entry in records:
        path = folder / entry.path
        if not path.is_file():
            return f"lacks {entry.path}"
        if path.stat().st_size != entry.size:
            return f"has {path.stat().st_size} bytes in {entry.path} instead of {entry.size}"
        if hashes and record(folder, path).sha256 != entry.sha256:
            return f"has other content in {entry.path} than was written"
    return None


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in a run's folder of them, and a sentence on each newer one that was passed over."""
    passed: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        wrong = problem(candidate)
        if wrong is None:
            return candidate, passed
        passed.append(f"{candidate.name} {wrong}")
    return None, passed


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
