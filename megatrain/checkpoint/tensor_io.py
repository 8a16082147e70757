"""Files of tensors, read by name and slice without loading the rest: safetensors and torch's .bin.

A damaged or hostile file raises CheckpointError; it neither runs code nor crashes the process.
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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatrain.checkpoint.manifest import WrittenFile, is_file
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


class TensorFile(Protocol):
    """A file of named tensors in a folder of them."""

    path: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def view(self, name: str) -> Tensor: ...

    def release(self, name: str) -> None: ...


class ByteSpan(NamedTuple):
    """Bytes [start, stop) of a file, which hold a tensor in row-major order."""

    path: Path
    start: int
    stop: int


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file: its header is read at once, tensors are mapped when they are viewed.

    `safe_open` checks the header in full. The header is parsed once more for two things that the
    library does not offer: the byte offsets of tensors, and an error if a name occurs twice.

    Raises CheckpointError if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_file(path):
            raise CheckpointError(f"{path} is missing or not a regular file")
        try:
            self._file = safe_open(path, framework="pt")
            self._entries = _read_header(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        except (SafetensorError, ValueError, KeyError, struct.error) as error:
            raise CheckpointError(
                f"{path} is truncated or corrupt ({type(error).__name__}: {_shorten(error)})"
            ) from None
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def view(self, name: str) -> Tensor:
        """Returns the mapped tensor, which must not be written to; see `release`."""
        # Access to a mapping beyond the end of its file would kill the process.
        if self.path.stat().st_size < self._entries[name].stop:
            raise CheckpointError(f"{self.path} was truncated while it was read")
        return self._file.get_tensor(name)

    def release(self, name: str) -> None:
        """Frees the memory of the pages that views of the tensor have read."""
        release(self.view(name))

    def span(self, name: str) -> ByteSpan:
        """Returns the bytes of the file that hold the tensor."""
        return ByteSpan(self.path, self._entries[name].start, self._entries[name].stop)


def _read_header(path: Path) -> dict[str, _Entry]:
    """Parses a header that `safe_open` accepted; raises ValueError if a name occurs twice."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length), object_pairs_hook=reject_duplicates)
    header.pop("__metadata__", None)
    data = 8 + length
    return {
        name: _Entry(
            _DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            *(data + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
    }


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dict; raises ValueError if a name occurs twice.

    For `object_pairs_hook` of `json.loads`.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_shorten(name)} occurs twice")
        found[name] = value
    return found


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """Writes CPU tensors to a safetensors file, hashes it on the way and flushes it to disk."""
    digest, size = hashlib.sha256(), 0
    # Wider elements first: each tensor then begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    layout = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names]
    header = make_header(layout, metadata=metadata or {})
    contents = (memoryview(raw_bytes(tensors[name]).numpy()) for name in names)
    with path.open("wb", buffering=0) as file:
        for content in [memoryview(header), *contents]:
            for start in range(0, len(content), _BLOCK):
                block = content[start : start + _BLOCK]
                digest.update(block)
                size += len(block)
                while block:
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    return WrittenFile(path, size, digest.hexdigest())


def make_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], *, metadata: Mapping[str, str]
) -> bytes:
    """Returns the header of a safetensors file with these names, dtypes and shapes, in order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    dtype_names = {dtype: name for name, dtype in _DTYPES.items()}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": dtype_names[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def raw_bytes(tensor: Tensor) -> Tensor:
    """Returns the tensor's elements in row-major order as uint8 [n]."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class BinFile:
    """A state dict of `torch.save`, Hugging Face's format before safetensors.

    The file is mapped, and read without running code from it.

    Raises CheckpointError if the file is missing, damaged or contains more than plain tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_file(path):
            raise CheckpointError(f"{path} is missing or not a regular file")
        loaded = load_without_code(path)
        if not isinstance(loaded, dict):
            raise CheckpointError(
                f"{path} contains a {type(loaded).__name__}; it must contain a state dict"
            )
        size = path.stat().st_size
        self._is_mapped = zipfile.is_zipfile(path)
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in loaded.items():
            is_valid = isinstance(name, str) and is_plain(tensor)
            if not is_valid or tensor.numel() * tensor.dtype.itemsize > size:
                raise CheckpointError(f"{path}: {_shorten(name)} is not a plain tensor")
            self._tensors[name] = tensor.detach()

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def view(self, name: str) -> Tensor:
        """Returns the mapped tensor, which must not be written to; see `release`."""
        return self._tensors[name]

    def release(self, name: str) -> None:
        """Frees the memory of the pages that views of the tensor have read."""
        if self._is_mapped:
            release(self._tensors[name])


def release(mapped: Tensor) -> None:
    """Frees the memory of the pages of a mapped tensor; they are read again on the next access.

    A mapping lives as long as any tensor of its file, and each page that was read counts as memory
    of the process.
    """
    storage = mapped.untyped_storage()
    start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and last > first:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
        )


def is_plain(tensor: Any) -> bool:
    """Returns True for a dense CPU tensor that is not of a subclass."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
    )


def load_without_code(path: Path, stand_ins: list[Any] | None = None) -> Any:
    """Returns the object that `torch.save` wrote, its tensors mapped.

    `stand_ins` are the classes other than tensors that may be created.

    Raises CheckpointError if the file is damaged or contains an object of another class.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_zip(path)
        # Files from before torch 1.6 are not zip files and cannot be mapped.
        with torch.serialization.safe_globals(stand_ins or []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or contains more than tensors, which could run code when it is "
            f"read ({_shorten(error)})"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # torch has no list of what a damaged file makes it raise
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {_shorten(error)})"
        ) from None


def _check_zip(path: Path) -> None:
    """Raises CheckpointError if an entry is compressed: it could unpack to more than memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    is_stored = all(
        entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        for entry in entries
    )
    if not is_stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} is compressed, which torch.save does not do")


def _shorten(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else text[:117] + "..."
