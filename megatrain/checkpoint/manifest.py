"""The manifest of a checkpoint: sizes and SHA-256 hashes of its files.

A checkpoint is written to a temporary folder, the manifest last, and then renamed. A folder under
a checkpoint's name is therefore complete, or was damaged afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from megatrain.errors import CheckpointError
from megatrain.files import TEMPORARY_PREFIX, flush_to_disk

MANIFEST = "manifest.json"
FORMAT = 3
"""2: optimizer/index.json. 3: train_state.json, named trainer.json before."""

TEMPORARY, TRASH = TEMPORARY_PREFIX, ".trash-"
"""Prefixes of folders that are being written or deleted."""

LEFTOVERS = (TEMPORARY, TRASH, ".writing-", ".deleting-")
"""Prefixes of folders that a killed run left; the last two are those of formats 1 and 2."""


class FileRecord(NamedTuple):
    """One file of a checkpoint: path relative to the folder, bytes, SHA-256."""

    path: str
    size: int
    sha256: str


class WrittenFile(NamedTuple):
    """A file that was hashed while it was written, and is on disk."""

    path: Path
    size: int
    sha256: str

    def record(self, folder: Path) -> FileRecord:
        """Returns the record for the manifest of `folder`."""
        return FileRecord(str(self.path.relative_to(folder)), self.size, self.sha256)


def make_record(folder: Path, path: Path) -> FileRecord:
    """Flushes a file to disk and returns its record."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
    return FileRecord(str(path.relative_to(folder)), path.stat().st_size, digest.hexdigest())


def commit(temporary: Path, final: Path, records: list[FileRecord]) -> None:
    """Writes the manifest and renames the folder to `final`, replacing one that exists."""
    write(temporary, records)
    if final.exists():
        # Renamed, not deleted: `final` is missing only between the two renames.
        trash = final.with_name(f"{TRASH}{final.name}")
        shutil.rmtree(trash, ignore_errors=True)
        final.rename(trash)
        temporary.rename(final)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        temporary.rename(final)
    flush_to_disk(final.parent)


def write(folder: Path, records: list[FileRecord]) -> None:
    """Writes the manifest and flushes it, and the folder's entries, to disk."""
    text = json.dumps({"format": FORMAT, "files": [r._asdict() for r in sorted(records)]}, indent=1)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    flush_to_disk(folder)


def find_problem(folder: Path, *, hashes: bool = False) -> str | None:
    """Returns the first problem of a checkpoint's files, as a predicate; None if it is complete.

    Sizes are always compared. `hashes` compares the contents too, which reads every file.
    """
    if not (folder / MANIFEST).is_file():
        return f"has no {MANIFEST}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format {version!r}")
        if version > FORMAT:
            return f"has format {version}; this version of megatrain reads formats up to {FORMAT}"
        records = [_checked(FileRecord(**entry)) for entry in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"has an unreadable {MANIFEST} ({type(error).__name__} {str(error)[:120]})"
    for entry in records:
        path = folder / entry.path
        if not is_file(path):
            return f"lacks {entry.path[:200]}"
        if path.stat().st_size != entry.size:
            return f"has {path.stat().st_size} bytes in {entry.path} instead of {entry.size}"
        if hashes and make_record(folder, path).sha256 != entry.sha256:
            return f"has other content in {entry.path} than was written"
    return None


def _checked(entry: FileRecord) -> FileRecord:
    """Raises ValueError unless the record has the right types and its path is inside the folder."""
    has_text = all(isinstance(text, str) for text in (entry.path, entry.sha256))
    if not has_text or type(entry.size) is not int or "\0" in entry.path:
        raise ValueError(f"invalid record {entry}")
    if Path(entry.path).is_absolute() or ".." in Path(entry.path).parts:
        raise ValueError(f"{entry.path} is outside the folder")
    return entry


def find_newest(folder: Path, *, hashes: bool = False) -> tuple[Path | None, list[str]]:
    """Returns the newest complete checkpoint of a folder, and why newer ones were skipped."""
    skipped: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        problem = find_problem(candidate, hashes=hashes)
        if problem is None:
            return candidate, skipped
        skipped.append(f"{candidate.name} {problem}")
    return None, skipped


def read_json(path: Path) -> dict:
    """Returns the JSON object in a file; raises CheckpointError if that is not possible."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or not a regular file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read: it must contain a JSON object")
    return content


def is_file(path: Path) -> bool:
    """Returns True for a regular file; False also for a path that the system rejects."""
    try:
        return path.is_file()
    except OSError:
        return False
