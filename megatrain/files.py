"""JSON Lines files that several starts of a run append to, and files that are replaced atomically.

A line is appended with one write: it is complete or, after a kill or on a full disk, truncated.
The next writer ends a truncated line first, and readers skip it, so other lines survive.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
"""Start of the names of files that are not complete yet; see `write_atomically`."""


class LineFile:
    """Appends objects to a file; each is in the file when `write` returns.

    Raises:
        OSError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes a line; paths become text, and NaN and infinities become null."""
        left = (
            f"{self._end_of_truncated_line()}{json.dumps(_plain(line), allow_nan=False)}\n".encode()
        )
        while left:  # a disk that fills up accepts a part; the next write fails
            left = left[os.write(self._file, left) :]

    def close(self) -> None:
        os.close(self._file)

    def _end_of_truncated_line(self) -> str:
        size = os.fstat(self._file).st_size
        return "\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else ""


def read(path: Path, *, last: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file; none if the file is missing.

    Args:
        last: bytes at the end of the file; only lines that lie completely in them are read.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        before = 0 if last is None else os.fstat(file.fileno()).st_size - last
        if before > 0:
            file.seek(before - 1)
            file.readline()  # to the start of a line
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:  # truncated, or not UTF-8
                continue
            if isinstance(found, dict):
                yield found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path for new content of `path`, which appears complete or not at all.

    After the block the temporary file is flushed to disk and renamed to `path`; a file of that name
    is replaced. If the block raises, the temporary file is deleted and `path` is left as it was.

    The temporary name is fixed, so that the next writer overwrites what a killed one left behind:
    two processes must not write the same path at once. It keeps the suffix, by which libraries
    choose a format, and lies in the same folder, which must exist.

        with write_atomically(folder / "counts.json") as temporary:
            temporary.write_text(json.dumps(counts), encoding="utf-8")

    Raises:
        OSError: the file cannot be written, flushed or renamed, for example on a full disk.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
