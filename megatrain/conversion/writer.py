"""Writes safetensors files block by block.

The header follows from names, dtypes and shapes, so that no tensor has to fit into memory. Tensors
whose bytes lie in a file as they are to be written are copied by the kernel, as `cp` does. A second
thread flushes to disk meanwhile.
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
from megatrain.checkpoint.tensor_io import ByteSpan, make_header, raw_bytes
from megatrain.conversion.sources import HasByteSpans, TensorReader, nbytes, read_row_blocks
from megatrain.errors import CheckpointError
from megatrain.files import flush_to_disk

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

_FLUSH_BYTES = 128 << 20
"""Bytes after which a flush to disk is started."""

_COPY_BYTES = 64 << 20
_COPY_UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that cannot copy between files."""


class BackgroundSync:
    """Flushes files to disk in a thread, while others are written."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []

    def start_flush(self, path: Path) -> None:
        """Starts to flush what the file contains now, unless a flush is running."""
        if not self._flushes or self._flushes[-1].done():
            self._flushes.append(self._thread.submit(flush_to_disk, path))

    def wait(self) -> None:
        """Waits for all flushes; raises the OSError of one that failed."""
        self._thread.shutdown()
        for flush in self._flushes:
            flush.result()


class OutputShard(NamedTuple):
    """One file to write: its name and its tensors in order."""

    file: str
    tensors: list[str]


def plan_shards(names: Iterable[str], tensors: TensorReader, max_bytes: int) -> list[OutputShard]:
    """Assigns tensors, in order, to files of at most `max_bytes`, or of one larger tensor."""
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
    tensors: TensorReader,
    *,
    on_write: Callable[[int], None],
    sync: BackgroundSync | None = None,
) -> None:
    """Writes all shards and their index; calls `on_write` with the bytes of each block."""
    for shard in shards:
        write_file(folder / shard.file, shard.tensors, tensors, on_write=on_write, sync=sync)
    if len(shards) > 1:
        total = sum(nbytes(tensors, name) for shard in shards for name in shard.tensors)
        weight_map = {name: shard.file for shard in shards for name in shard.tensors}
        write_weight_map(folder, dict(sorted(weight_map.items())), total_size=total)


def write_file(
    path: Path,
    names: list[str],
    tensors: TensorReader,
    *,
    on_write: Callable[[int], None],
    sync: BackgroundSync | None = None,
) -> None:
    """Writes one safetensors file; calls `on_write` with the bytes of each block."""
    # Wider elements first: each tensor then begins at a multiple of its element's size.
    names = sorted(names, key=lambda name: -tensors.dtype(name).itemsize)
    unflushed = 0
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(_header(names, tensors)))
        for name in names:
            for count in _write_tensor(file.fileno(), tensors, name):
                on_write(count)
                unflushed += count
                if sync is not None and unflushed >= _FLUSH_BYTES:
                    sync.start_flush(path)
                    unflushed = 0


def _write_tensor(descriptor: int, tensors: TensorReader, name: str) -> Iterator[int]:
    """Writes a tensor in blocks; yields the bytes of each."""
    span = tensors.span(name) if isinstance(tensors, HasByteSpans) else None
    if span is not None and span.start < span.stop and _can_copy(span, descriptor):
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            yield from _copy_span(span, descriptor)
            return
        except OSError as error:
            if error.errno not in _COPY_UNSUPPORTED:
                raise
            os.lseek(descriptor, start, os.SEEK_SET)
    for block in read_row_blocks(tensors, name):
        _write_all(descriptor, memoryview(raw_bytes(block).numpy()))
        yield block.nbytes


def _can_copy(span: ByteSpan, descriptor: int) -> bool:
    same_device = span.path.stat().st_dev == os.fstat(descriptor).st_dev
    return hasattr(os, "copy_file_range") and same_device


def _copy_span(span: ByteSpan, descriptor: int) -> Iterator[int]:
    with span.path.open("rb") as source:
        offset = span.start
        while offset < span.stop:
            size = min(span.stop - offset, _COPY_BYTES)
            count = os.copy_file_range(source.fileno(), descriptor, size, offset)
            if count == 0:
                raise CheckpointError(f"{span.path} became shorter while it was read")
            offset += count
            yield count


def _header(names: list[str], tensors: TensorReader) -> bytes:
    for name in names:
        if tensors.dtype(name) not in (*_FLOATS, *_INTEGERS):
            raise CheckpointError(
                f"{name} has dtype {tensors.dtype(name)}, which is not supported; "
                "use --dtype bf16, fp16 or fp32"
            )
    return make_header(
        [(name, tensors.dtype(name), tensors.shape(name)) for name in names],
        metadata={"format": "pt"},
    )


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]
