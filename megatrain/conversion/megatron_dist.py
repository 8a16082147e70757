"""Megatron-LM's torch_dist checkpoints: whole tensors in chunks, read without ranks.

    iter_0001000/
      .metadata                     a pickle: each tensor's size, the boxes and files of its chunks
      __0_0.distcp ...              chunks, each as torch.save writes a tensor
      common.pt                     args

torch.distributed.checkpoint writes them. The pickle is read with stand-ins for all classes, so
that no code can run. Layers are tensors of their own (decoder.layers.3.x) or one tensor with the
layers as first dimension (decoder.layers.x). Fused linears are in the order of a single tensor
rank: the gate and the up half of a gated MLP are each contiguous.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatrain.checkpoint.tensor_io import is_plain
from megatrain.conversion.megatron_legacy import (
    RankShards,
    common_name,
    load_state,
    read_namespace,
)
from megatrain.errors import CheckpointError


class _Record:
    """Stand-in for any object of the metadata: keeps its state without running code."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    @property
    def _key(self) -> tuple[Any, Any]:
        return self.__dict__.get("fqn"), self.__dict__.get("offset")

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Record) and self._key == other._key


_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA_CLASSES = (
    "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties MetadataIndex "
    "ChunkStorageMetadata StorageMeta _MEM_FORMAT_ENCODING"
)
_RECORDS = {
    *((f"{_CHECKPOINT}.metadata", name) for name in _METADATA_CLASSES.split()),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")


class _Chunk(NamedTuple):
    """A box of a tensor, and the file and bytes of its content."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    offset: int
    length: int


class _StoredTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[_Chunk]


class _Tensor(NamedTuple):
    """A tensor under its common name: a stored one, or one layer of a stacked one."""

    stored: _StoredTensor
    layer: int | None


class DistributedShard:
    """The whole model, as the shard of a single tensor rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = _name_tensors(_read_metadata(folder), folder)

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, layer = self._tensors[name]
        return stored.shape if layer is None else stored.shape[1:]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].stored.dtype

    def view(self, name: str) -> Tensor:
        """Returns the tensor, assembled from its chunks in new memory."""
        stored, layer = self._tensors[name]
        first, last, shape = 0, (*stored.shape, 1)[0], stored.shape
        if layer is not None:
            first, last, shape = layer, layer + 1, (1, *stored.shape[1:])
        tensor = torch.empty(shape, dtype=stored.dtype)
        for chunk in stored.chunks:
            self._copy_chunk(chunk, tensor, first, last)
        return tensor if layer is None else tensor[0]

    def _copy_chunk(self, chunk: _Chunk, tensor: Tensor, first: int, last: int) -> None:
        """Copies a chunk's part of the rows [first, last) that `tensor` holds."""
        if not chunk.start:
            tensor.copy_(_read_chunk(self.folder, chunk, tensor.dtype))
            return
        start, stop = max(first, chunk.start[0]), min(last, chunk.start[0] + chunk.size[0])
        if start >= stop:
            return
        content = _read_chunk(self.folder, chunk, tensor.dtype)
        box = tuple(slice(s, s + n) for s, n in zip(chunk.start[1:], chunk.size[1:], strict=True))
        rows = content[start - chunk.start[0] : stop - chunk.start[0]]
        tensor[(slice(start - first, stop - first), *box)] = rows

    def release(self, name: str) -> None:
        """Does nothing: the memory of a view is its own."""


def is_distributed(folder: Path) -> bool:
    return (folder / ".metadata").is_file()


def read_distributed(folder: Path) -> RankShards:
    """Reads the metadata and the args of a checkpoint, but no tensor."""
    args = None
    if (folder / "common.pt").is_file():
        args = read_namespace(load_state(folder / "common.pt"), folder / "common.pt")
    return RankShards(folder, [DistributedShard(folder)], args, "torch_dist chunks")


def _read_metadata(folder: Path) -> dict[str, _StoredTensor]:
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        return {
            name: _stored_tensor(name, entry, metadata.storage_data)
            for name, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "size")
        }
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is rejected: it is damaged or contains more than metadata ({_one_line(error)})"
        ) from None
    except Exception as error:  # a damaged pickle can combine the stand-ins in any way
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {_one_line(error)})"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:150]


def _stored_tensor(name: str, entry: Any, storage: dict[Any, Any]) -> _StoredTensor:
    dtype = entry.properties.state[0]
    shape = _counts(entry.size)
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a name, or {dtype!r} is not a dtype")
    chunks = [_chunk(name, shape, chunk, storage) for chunk in entry.chunks]
    is_complete = sum(math.prod(chunk.size) for chunk in chunks) == math.prod(shape)
    if not is_complete or any(_overlap(a, b) for i, a in enumerate(chunks) for b in chunks[:i]):
        raise ValueError(f"the chunks of {name} do not contain each element exactly once")
    return _StoredTensor(shape, dtype, chunks)


def _chunk(name: str, shape: tuple[int, ...], chunk: Any, storage: dict[Any, Any]) -> _Chunk:
    index = _Record()
    index.__setstate__({"fqn": name, "offset": chunk.offsets})
    info = storage[index]
    start, size = _counts(chunk.offsets), _counts(chunk.sizes)
    if len(start) != len(shape) or len(size) != len(shape):
        raise ValueError(f"a chunk of {name} has another number of dimensions")
    if any(a + b > c for a, b, c in zip(start, size, shape, strict=True)):
        raise ValueError(f"a chunk of {name} exceeds its shape")
    file = info.relative_path
    is_name = isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file
    if not is_name or "\0" in file:
        raise ValueError(f"{str(file)[:80]!r} of {name} must be a file in the same folder")
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{name} is compressed or encrypted")
    return _Chunk(start, size, file, *_counts((info.offset, info.length)))


def _counts(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ValueError(f"{numbers!r} must be non-negative integers")
    return numbers


def _overlap(a: _Chunk, b: _Chunk) -> bool:
    return math.prod(a.size) * math.prod(b.size) > 0 and all(
        x < y + n and y < x + m for x, m, y, n in zip(a.start, a.size, b.start, b.size, strict=True)
    )


def _read_chunk(folder: Path, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    path = folder / chunk.file
    try:
        with path.open("rb") as file:
            file.seek(chunk.offset)
            content = file.read(chunk.length)
        if len(content) != chunk.length:
            raise CheckpointError(f"{path} is truncated")
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch does not document what a damaged file raises
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {_one_line(error)})"
        ) from None
    if not isinstance(tensor, Tensor) or not is_plain(tensor):
        raise CheckpointError(f"{path}: a chunk is not a plain tensor")
    if (tuple(tensor.shape), tensor.dtype) != (chunk.size, dtype):
        raise CheckpointError(f"{path}: a chunk has another shape or dtype than .metadata says")
    return tensor.detach()


def _name_tensors(stored: dict[str, _StoredTensor], folder: Path) -> dict[str, _Tensor]:
    """Returns the model's tensors by their common names, layers separately."""
    tensors: dict[str, _Tensor] = {}
    for key, entry in stored.items():
        bare = key.removeprefix("model.")
        stacked = re.fullmatch(r"decoder\.layers\.(?!\d+\.)(.+)", bare)
        if not bare.startswith(("embedding.", "decoder.", "output_layer.")):
            continue
        if stacked is not None and not entry.shape:
            raise CheckpointError(f"{folder} contains {key} without a dimension of layers")
        layers = [None] if stacked is None else list(range(entry.shape[0]))
        for layer in layers:
            name = common_name(bare if stacked is None else f"decoder.layers.{layer}.{stacked[1]}")
            if name is None:
                continue
            if name in tensors:
                raise CheckpointError(f"{folder} contains {name} twice")
            tensors[name] = _Tensor(entry, layer)
    return tensors
