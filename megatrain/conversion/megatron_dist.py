"""Megatron-LM's torch_dist checkpoints: whole tensors in chunks, as torch.distributed.checkpoint writes them, read without ranks.

    iter_0001000/
      .metadata                     for each tensor its size, its chunks and where their bytes are; a pickle
      __0_0.distcp ...              chunks, each as torch.save writes a tensor
      common.pt                     args

The pickle is read with stand-ins for all of its classes, so that none of their code, nor any other, can run. Layers are tensors of
their own (decoder.layers.3.x) or one tensor with the layers as first dim (decoder.layers.x). Fused linears are in the order that
the ranks hold; gate and up of a gated MLP, which each rank holds half of, are whole one after the other.
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
from megatrain.conversion.megatron_legacy import Ranks, common_name, load_state, read_namespace
from megatrain.errors import CheckpointError


class _Record:
    """Stands in for any object of the metadata: keeps its state, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def __hash__(self) -> int:
        return hash((self.__dict__.get("fqn"), self.__dict__.get("offset")))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Record) and (
            self.__dict__.get("fqn"),
            self.__dict__.get("offset"),
        ) == (other.__dict__.get("fqn"), other.__dict__.get("offset"))


_CHECKPOINT = "torch.distributed.checkpoint"
_RECORDS = {
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    ),
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
        raise pickle.UnpicklingError(f"{module}.{name} is not of a checkpoint's metadata")


class _Chunk(NamedTuple):
    """A box of a tensor and where its bytes are."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    offset: int
    length: int


class _Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[_Chunk]


class _Place(NamedTuple):
    """A tensor of the common names: the stored one, and which of its first dim where layers are stacked."""

    stored: _Stored
    layer: int | None


class DistributedShard:
    """The whole model, as the only tensor rank would hold it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places = _places(_read_metadata(folder), folder)

    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, layer = self._places[name]
        return stored.shape if layer is None else stored.shape[1:]

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].stored.dtype

    def view(self, name: str) -> Tensor:
        """Put together from its chunks, in memory of its own."""
        stored, layer = self._places[name]
        first, last = (
            (0, stored.shape[0] if stored.shape else 1) if layer is None else (layer, layer + 1)
        )
        whole = torch.empty(
            (last - first, *stored.shape[1:]) if stored.shape else (), dtype=stored.dtype
        )
        for chunk in stored.chunks:
            self._copy(chunk, stored.dtype, whole, first, last)
        return whole if layer is None else whole[0]

    def _copy(
        self, chunk: _Chunk, dtype: torch.dtype, whole: Tensor, first: int, last: int
    ) -> None:
        if not chunk.start:
            whole.copy_(_read_chunk(self.folder, chunk, dtype))
            return
        low, high = max(first, chunk.start[0]), min(last, chunk.start[0] + chunk.size[0])
        if low < high:
            rest = tuple(
                slice(start, start + size)
                for start, size in zip(chunk.start[1:], chunk.size[1:], strict=True)
            )
            part = _read_chunk(self.folder, chunk, dtype)[
                low - chunk.start[0] : high - chunk.start[0]
            ]
            whole[(slice(low - first, high - first), *rest)] = part

    def let_go(self, name: str) -> None:
        """Nothing: a view's memory is its own."""


def is_distributed(folder: Path) -> bool:
    return (folder / ".metadata").is_file()


def read_distributed(folder: Path) -> Ranks:
    """The checkpoint, its tensors described and none of them read."""
    args = None
    if (folder / "common.pt").is_file():
        args = read_namespace(load_state(folder / "common.pt"), folder / "common.pt")
    return Ranks(folder, [DistributedShard(folder)], args, "torch_dist chunks")


def _read_metadata(folder: Path) -> dict[str, _Stored]:
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        return {
            name: _stored(name, entry, found.storage_data)
            for name, entry in found.state_dict_metadata.items()
            if hasattr(entry, "size")
        }
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged or holds more than a checkpoint's metadata ({' '.join(str(error).split())[:150]})"
        ) from None
    except Exception as error:  # a damaged pickle can make anything of its stand-ins
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
        ) from None


def _stored(name: str, entry: Any, storage: dict[Any, Any]) -> _Stored:
    dtype = entry.properties.state[0]
    shape = _numbers(entry.size)
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no name, or {dtype!r} no dtype")
    chunks = []
    for number, chunk in enumerate(entry.chunks):
        index = _Record()
        index.__setstate__({"fqn": name, "offset": chunk.offsets})
        info = storage[index]
        start, size = _numbers(chunk.offsets), _numbers(chunk.sizes)
        if (
            len(start) != len(shape)
            or len(size) != len(shape)
            or any(a + b > c for a, b, c in zip(start, size, shape, strict=True))
        ):
            raise ValueError(f"chunk {number} of {name} is not inside it")
        file = info.relative_path
        if (
            not isinstance(file, str)
            or file in ("", ".", "..")
            or Path(file).name != file
            or "\0" in file
        ):
            raise ValueError(
                f"{name} is in {str(file)[:80]!r}, which is not the name of a file in the folder"
            )
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{name} is compressed or encrypted")
        chunks.append(_Chunk(start, size, file, *_numbers((info.offset, info.length))))
    if sum(math.prod(chunk.size) for chunk in chunks) != math.prod(shape) or any(
        _meet(a, b) for i, a in enumerate(chunks) for b in chunks[:i]
    ):
        raise ValueError(f"the chunks of {name} are not the whole of it, each element once")
    return _Stored(shape, dtype, chunks)


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ValueError(f"{numbers!r} are not all natural numbers")
    return numbers


def _meet(a: _Chunk, b: _Chunk) -> bool:
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
            raise CheckpointError(f"{path} is cut short")
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch has no list of what a damaged file makes it raise
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
        ) from None
    if (
        not isinstance(tensor, Tensor)
        or not is_plain(tensor)
        or tuple(tensor.shape) != chunk.size
        or tensor.dtype != dtype
    ):
        raise CheckpointError(f"{path} does not hold the chunk that .metadata tells of")
    return tensor.detach()


def _places(stored: dict[str, _Stored], folder: Path) -> dict[str, _Place]:
    """The model's tensors among all, each layer by itself."""
    places: dict[str, _Place] = {}
    for key, entry in stored.items():
        plain = key.removeprefix("model.")
        stacked = re.fullmatch(r"decoder\.layers\.(?!\d+\.)(.+)", plain)
        if not plain.startswith(("embedding.", "decoder.", "output_layer.")):
            continue
        if stacked is not None and not entry.shape:
            raise CheckpointError(f"{folder} holds {key} without a dim of layers")
        numbers = [None] if stacked is None else list(range(entry.shape[0]))
        for layer in numbers:
            name = common_name(plain if stacked is None else f"decoder.layers.{layer}.{stacked[1]}")
            if name is None:
                continue
            if name in places:
                raise CheckpointError(f"{folder} holds {name} twice")
            places[name] = _Place(entry, layer)
    return places
