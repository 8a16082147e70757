"""One file of tensors, read by name and slice without loading the rest: safetensors, or torch's .bin without code.

The header is checked in full before anything is believed: sizes, offsets and the file's length have to agree, so that a
damaged or hostile file is a CheckpointError and never a crash, a wait or a wrong number.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatrain.checkpoint.manifest import is_file
from megatrain.errors import CheckpointError

Index = tuple[slice, ...]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLOCK = 1 << 24
_MAX_HEADER = 100_000_000
"""Bytes; what the safetensors format allows."""


class TensorFile(Protocol):
    """What a folder of tensors asks of each of its files."""

    path: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def view(self, name: str) -> Tensor: ...

    def let_go(self, name: str) -> None: ...


class ByteSpan(NamedTuple):
    """Bytes [start, stop) of a file, which are a tensor's, row by row."""

    path: Path
    start: int
    stop: int


class _Place(NamedTuple):
    """Where a tensor's bytes are in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file. Its header is read at once, its data when a view is looked at.

    Attributes:
        metadata: the header's `__metadata__`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size, text = _header(path)
        try:
            header = json.loads(text, object_pairs_hook=no_name_twice)
            entries: Any = dict(header)
            self.metadata: dict[str, str] = dict(entries.pop("__metadata__", None) or {})
            self._places = {name: _place(entry, 8 + len(text)) for name, entry in entries.items()}
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise CheckpointError(
                f"{path} has a header that is damaged ({type(error).__name__}: {_short(error)})"
            ) from None
        self._check_places(8 + len(text), size)

    def _check_places(self, end: int, size: int) -> None:
        for name, place in sorted(self._places.items(), key=lambda item: item[1].start):
            if place.start != end:
                raise CheckpointError(
                    f"{self.path} has a header that is damaged (a gap or an overlap before {_short(name)})"
                )
            end = place.stop
        if end != size:
            raise CheckpointError(
                f"{self.path} has {size} bytes and its header tells of {end}: it is "
                f"{'cut short' if size < end else 'longer than it should be'}"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def view(self, name: str) -> Tensor:
        """The tensor in a mapping of the file, which lives as long as the result; not to be written to."""
        dtype, shape, start, stop = self._places[name]
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        base = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                if (
                    os.fstat(file.fileno()).st_size < stop
                ):  # touching a mapping beyond the end would kill the process
                    raise CheckpointError(f"{self.path} has become shorter while it was read")
                # Copy on write, since torch wants memory that may be written to.
                mapped = mmap.mmap(file.fileno(), stop - base, offset=base, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        if start % dtype.itemsize == 0:
            return torch.frombuffer(mapped, dtype=dtype, offset=start - base).view(shape)
        return torch.frombuffer(bytearray(mapped[start - base :]), dtype=dtype).view(shape)

    def let_go(self, name: str) -> None:
        """Nothing: a view's mapping goes with it."""

    def span(self, name: str) -> ByteSpan:
        """Where the tensor's bytes are."""
        return ByteSpan(self.path, self._places[name].start, self._places[name].stop)


def _header(path: Path) -> tuple[int, bytes]:
    """The file's size and its header's JSON."""
    if not is_file(path):
        raise CheckpointError(f"{path} is missing or no file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            if len(first) < 8:
                raise CheckpointError(f"{path} has {size} bytes and is cut short before its header")
            (length,) = struct.unpack("<Q", first)
            if length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} has {size} bytes and tells of a header of {length}: it is cut short or damaged"
                )
            return size, file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _place(entry: dict[str, Any], data: int) -> _Place:
    dtype, shape, (start, stop) = (
        _DTYPES[entry["dtype"]],
        tuple(entry["shape"]),
        entry["data_offsets"],
    )
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, start, stop)):
        raise ValueError("a size or an offset is no natural number")
    if math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"shape {shape} does not take {stop - start} bytes")
    return _Place(dtype, shape, data + start, data + stop)


def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different; ValueError otherwise."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_short(name)} is there twice")
        found[name] = value
    return found


class WrittenFile(NamedTuple):
    """A file that is on the disk, with the SHA-256 of its bytes."""

    path: Path
    size: int
    sha256: str


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """Write a safetensors file from CPU tensors as they lie in memory, hashed on the way, and see it on the disk."""
    digest, size = hashlib.sha256(), 0
    # Wider elements first: each tensor then begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    with path.open("wb", buffering=0) as file:
        header = make_header(
            [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names],
            metadata=metadata or {},
        )
        for block in [
            memoryview(header),
            *(memoryview(raw_bytes(tensors[name]).numpy()) for name in names),
        ]:
            for start in range(0, len(block), _BLOCK):
                part = block[start : start + _BLOCK]
                digest.update(part)
                size += len(part)
                while part:
                    part = part[file.write(part) :]
        os.fsync(file.fileno())
    return WrittenFile(path, size, digest.hexdigest())


def make_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], *, metadata: Mapping[str, str]
) -> bytes:
    """What a safetensors file begins with, from the name, dtype and shape of each tensor in the order of their bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    words = {dtype: word for word, dtype in _DTYPES.items()}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": words[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def raw_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory, row by row, uint8 [n]."""
    return (
        tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if tensor.numel()
        else torch.empty(0, dtype=torch.uint8)
    )


class BinFile:
    """A state dict of torch.save, as Hugging Face kept models before safetensors: mapped, and read so that no code in it runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_file(path):
            raise CheckpointError(f"{path} is missing or no file")
        loaded = load_without_code(path)
        if not isinstance(loaded, dict):
            raise CheckpointError(
                f"{path} holds a {type(loaded).__name__} and no state dict of tensors"
            )
        size = path.stat().st_size
        self._mapped = zipfile.is_zipfile(path)
        for name, tensor in loaded.items():
            if (
                not isinstance(name, str)
                or not is_plain(tensor)
                or tensor.numel() * tensor.dtype.itemsize > size
            ):
                raise CheckpointError(f"{path} holds {_short(name)}, which is not a plain tensor")
        self._tensors: dict[str, Tensor] = {
            name: tensor.detach() for name, tensor in loaded.items()
        }

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def view(self, name: str) -> Tensor:
        """The tensor in a mapping of the file; not to be written to."""
        return self._tensors[name]

    def let_go(self, name: str) -> None:
        """Give back the pages of the tensor's mapping that have been looked at."""
        if self._mapped:
            release(self._tensors[name])


def release(mapped: Tensor) -> None:
    """Give back the memory of the pages of a tensor that is mapped from a file; they are read again when they are asked for.

    torch keeps the mapping as long as the file's other tensors, and every page that was read would count as this process's.
    """
    start, stop = (
        mapped.untyped_storage().data_ptr(),
        mapped.untyped_storage().data_ptr() + mapped.untyped_storage().nbytes(),
    )
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and last > first:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
        )


def is_plain(tensor: Any) -> bool:
    """Whether it is a dense CPU tensor of no class of its own."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
    )


def load_without_code(path: Path, stand_ins: list[Any] | None = None) -> Any:
    """What torch.save wrote, its tensors mapped. Classes other than tensors are refused, but for those that have a stand-in."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_zip(path)
        # What torch wrote before 1.6 is no zip and cannot be mapped.
        with torch.serialization.safe_globals(stand_ins or []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged or holds more than tensors, which could run code when read "
            f"({_short(error)})"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # torch has no list of what a damaged file makes it raise
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {_short(error)})"
        ) from None


def _check_zip(path: Path) -> None:
    """Nothing compressed, as torch writes it: what unpacks to more than the file is refused."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(
        entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
        for entry in entries
    ) or (sum(entry.file_size for entry in entries) > path.stat().st_size):
        raise CheckpointError(
            f"{path} is refused: it is packed in a way that torch.save does not use"
        )


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else text[:117] + "..."
