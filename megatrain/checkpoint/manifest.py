"""A checkpoint appears whole or not at all: a temporary folder, a manifest of sizes and hashes, one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatrain.errors import CheckpointError

if TYPE_CHECKING:  # it brings torch, and whether a checkpoint is whole is asked without
    from megatrain.checkpoint.tensor_io import WrittenFile

MANIFEST = "manifest.json"
FORMAT = 2
WRITING, DELETING = ".writing-", ".deleting-"
"""How folders are called that are not checkpoints yet, or no longer."""


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


def record_written(folder: Path, file: WrittenFile) -> FileRecord:
    """The record of a file that was hashed as it was written."""
    return FileRecord(str(file.path.relative_to(folder)), file.size, file.sha256)


def commit(temporary: Path, final: Path, records: list[FileRecord]) -> None:
    """Write the manifest and rename; what stood at `final` before is replaced."""
    write(temporary, records)
    if (
        final.exists()
    ):  # moved aside and not deleted, so that only the moment between two renames is without it
        aside = final.with_name(f"{DELETING}{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(final)
    fsync_folder(final.parent)


def write(folder: Path, records: list[FileRecord]) -> None:
    """Write the manifest, and see it on the disk."""
    text = json.dumps({"format": FORMAT, "files": [r._asdict() for r in sorted(records)]}, indent=1)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)


def fsync_folder(path: Path) -> None:
    """See a file, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_problem(folder: Path, *, hashes: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, None when it is whole. Sizes always, hashes on request."""
    if not (folder / MANIFEST).is_file():
        return f"has no {MANIFEST}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        form = manifest["format"]
        if type(form) is not int or form < 1:
            raise ValueError(f"format {form!r}")
        if form > FORMAT:
            return f"is of format {form} and this version reads up to {FORMAT}"
        records = [_checked(FileRecord(**entry)) for entry in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"has an unreadable {MANIFEST} ({type(error).__name__} {str(error)[:120]})"
    for entry in records:
        path = folder / entry.path
        if not is_file(path):
            return f"lacks {entry.path[:200]}"
        if path.stat().st_size != entry.size:
            return f"has {path.stat().st_size} bytes in {entry.path} instead of {entry.size}"
        if hashes and record(folder, path).sha256 != entry.sha256:
            return f"has other content in {entry.path} than was written"
    return None


def _checked(entry: FileRecord) -> FileRecord:
    """A record of a file inside the folder."""
    if (
        not all(isinstance(text, str) for text in (entry.path, entry.sha256))
        or type(entry.size) is not int
        or "\0" in entry.path
    ):
        raise ValueError(f"{entry} is no record of a file")
    if Path(entry.path).is_absolute() or ".." in Path(entry.path).parts:
        raise ValueError(f"{entry.path} is outside the folder")
    return entry


def find_newest(folder: Path, *, hashes: bool = False) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in a run's folder of them, and a sentence on each newer one that was passed over."""
    passed: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        wrong = find_problem(candidate, hashes=hashes)
        if wrong is None:
            return candidate, passed
        passed.append(f"{candidate.name} {wrong}")
    return None, passed


def read_json(path: Path) -> dict:
    """A file's mapping."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or no file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no mapping")
    return content


def is_file(path: Path) -> bool:
    """Whether it is a file, also where its name cannot be one."""
    try:
        return path.is_file()
    except OSError:
        return False
