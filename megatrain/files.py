"""Files of one JSON object a line that several starts of a run append to and that survive its end at any moment.

A line is appended with one write: it is whole or, after a kill or on a full disk, torn. The next writer ends a torn line
first, and readers read over it, so it costs no other.
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
    """Appends objects to a file, each there as soon as `write` returns. OSError where it cannot."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, line: Mapping[str, Any]) -> None:
        """Paths are written as text, what is not finite as null."""
        left = f"{self._end_of_torn_line()}{json.dumps(_plain(line), allow_nan=False)}\n".encode()
        while left:  # a disk that fills up takes a part, and refuses the next
            left = left[os.write(self._file, left) :]

    def close(self) -> None:
        os.close(self._file)

    def _end_of_torn_line(self) -> str:
        size = os.fstat(self._file).st_size
        return "\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else ""


def read(path: Path, *, last: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file in turn, none where there is no file. With `last`, those that lie whole in as many bytes at its end."""
    if not path.exists():
        return
    with path.open("rb") as file:
        before = 0 if last is None else os.fstat(file.fileno()).st_size - last
        if before > 0:
            file.seek(before - 1)
            file.readline()  # to where a line begins
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:  # torn, or not UTF-8
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
