"""Writes safetensors block by block: the header follows from names, dtypes and shapes, so that no tensor has to be whole in memory.

Bytes that lie in a file as they are to be written are copied by the system, as `cp` does, and never come to this process.

While blocks are written a second thread has the disk catch up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from megatrain.checkpoint.hf_folder import shard_names, write_weight_map
from megatrain.checkpoint.manifest import fsync_folder
from megatrain.checkpoint.tensor_io import ByteSpan, make_header, raw_bytes
from megatrain.conversion.sources import HasSpans, Readable, nbytes, row_blocks_of
from megatrain.errors import CheckpointError

_WRITTEN = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)

_BEHIND = 128 << 20
"""Bytes after which the disk is asked to catch up."""

_COPIED_BYTES = 64 << 20
_NOT_COPIED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that does not copy between files."""


class BackgroundSync:
    """Has the disk write what the system still holds in memory, beside other work, so that little is left to wait for at the end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._done: list[Future[None]] = []

    def catch_up(self, path: Path) -> None:
        """Begin with what the file holds now, unless the disk is still busy with what it was asked before."""
        if not self._done or self._done[-1].done():
            self._done.append(self._thread.submit(fsync_folder, path))

    def wait(self) -> None:
        """Until nothing is under way; raises the OSError of a write that failed."""
        self._thread.shutdown()
        for future in self._done:
            future.result()


class OutputShard(NamedTuple):
    """One file to write: its name and its tensors in order."""

    file: str
    tensors: list[str]


def plan_shards(names: Iterable[str], tensors: Readable, max_bytes: int) -> list[OutputShard]:
    """Cut the tensors, in their order, into files of at most `max_bytes`; a larger tensor has a file of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        if groups[-1] and size + nbytes(tensors, name) > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes(tensors, name)
    return [
        OutputShard(name, group)
        for name, group in zip(shard_names(len(groups)), groups, strict=True)
    ]


def write_model(
    folder: Path,
    shards: list[OutputShard],
    tensors: Readable,
    *,
    wrote: Callable[[int], None],
    catcher: BackgroundSync | None = None,
) -> None:
    """Write all shards and their index. `wrote` is told of each block's bytes."""
    for shard in shards:
        write_file(folder / shard.file, shard.tensors, tensors, wrote=wrote, catcher=catcher)
    if len(shards) > 1:
        total = sum(nbytes(tensors, name) for shard in shards for name in shard.tensors)
        homes = {name: shard.file for shard in shards for name in shard.tensors}
        write_weight_map(folder, dict(sorted(homes.items())), total_size=total)


def write_file(
    path: Path,
    names: list[str],
    tensors: Readable,
    *,
    wrote: Callable[[int], None],
    catcher: BackgroundSync | None = None,
) -> None:
    """Write one safetensors file; the catcher has the disk follow."""
    # Wider elements first: each tensor then begins at a multiple of its element's size.
    names = sorted(names, key=lambda name: -tensors.dtype(name).itemsize)
    behind = 0
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(_header(names, tensors)))
        for count in (
            count for name in names for count in _write_tensor(file.fileno(), tensors, name)
        ):
            wrote(count)
            behind += count
            if catcher is not None and behind >= _BEHIND:
                catcher.catch_up(path)
                behind = 0


def _write_tensor(handle: int, tensors: Readable, name: str) -> Iterator[int]:
    """Write it in parts; yields the bytes of each."""
    span = tensors.span(name) if isinstance(tensors, HasSpans) else None
    if span is not None and span.start < span.stop and _copies_files(span, handle):
        begin = os.lseek(handle, 0, os.SEEK_CUR)
        try:
            yield from _copy_span(span, handle)
            return
        except OSError as error:
            if error.errno not in _NOT_COPIED:
                raise
            os.lseek(handle, begin, os.SEEK_SET)
    for block in row_blocks_of(tensors, name):
        _write_all(handle, memoryview(raw_bytes(block).numpy()))
        yield block.nbytes


def _copies_files(span: ByteSpan, handle: int) -> bool:
    """Whether the system copies between these files."""
    return hasattr(os, "copy_file_range") and span.path.stat().st_dev == os.fstat(handle).st_dev


def _copy_span(span: ByteSpan, handle: int) -> Iterator[int]:
    with span.path.open("rb") as source:
        at = span.start
        while at < span.stop:
            count = os.copy_file_range(
                source.fileno(), handle, min(span.stop - at, _COPIED_BYTES), at
            )
            if count == 0:
                raise CheckpointError(f"{span.path} has become shorter while it was read")
            at += count
            yield count


def _header(names: list[str], tensors: Readable) -> bytes:
    for name in names:
        if tensors.dtype(name) not in _WRITTEN:
            raise CheckpointError(
                f"{name} is of {tensors.dtype(name)}, which is not written; convert with --dtype bf16, fp16 or fp32"
            )
    return make_header(
        [(name, tensors.dtype(name), tensors.shape(name)) for name in names],
        metadata={"format": "pt"},
    )


def _write_all(handle: int, view: memoryview) -> None:
    while view:
        view = view[os.write(handle, view) :]
