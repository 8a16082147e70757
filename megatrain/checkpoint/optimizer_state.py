"""The optimizer/ folder of a checkpoint: pieces of each tensor's master and states by name and place, and an index of them.

    optimizer/
      index.json                    files, states, and for each tensor its pieces: which file, which elements
      rank-00000.safetensors ...    "NAME[START:STOP]/STATE", fp32 [n], for each piece that the rank wrote

Each element of a tensor is in one piece; copies that ranks hold of each other's are not written. A reader on any layout
works out from the index which elements of which files are its own, and looks at those alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatrain.checkpoint.tensor_io import SafetensorsFile
from megatrain.distributed.reshard import (
    CopyPlan,
    FlatShard,
    covers,
    intersect,
    intervals_of,
    make_flat_shard,
)
from megatrain.errors import CheckpointError
from megatrain.optim.zero import Fragment

INDEX = "index.json"


class NamedFlatShard(NamedTuple):
    """A piece of the tensor `name`."""

    name: str
    piece: FlatShard


class OptimizerSnapshot(NamedTuple):
    """A rank's pieces and their tensors in CPU memory, ready to be written."""

    pieces: list[NamedFlatShard]
    tensors: dict[str, Tensor]


def flat_shard_of(fragment: Fragment) -> NamedFlatShard:
    count = next(iter(fragment.tensors.values())).numel()
    return NamedFlatShard(
        fragment.sharding.name,
        make_flat_shard(fragment.sharding, fragment.shape, fragment.start, count),
    )


def snapshot(fragments: Iterable[Fragment]) -> OptimizerSnapshot:
    """Copies of the fragments that this rank is to write: those that it counts."""
    pieces, tensors = [], {}
    for fragment in fragments:
        if fragment.sharding.is_owner:
            piece = flat_shard_of(fragment)
            pieces.append(piece)
            for state, tensor in fragment.tensors.items():
                tensors[flat_shard_key(piece, state)] = (
                    tensor.detach().to("cpu", copy=True).contiguous()
                )
    return OptimizerSnapshot(pieces, tensors)


def write_index(
    folder: Path, files: Mapping[str, list[NamedFlatShard]], states: Iterable[str]
) -> Path:
    """The index of files by name, each with the pieces that it holds."""
    tensors: dict[str, dict[str, Any]] = {}
    for number, pieces in enumerate(files.values()):
        for name, piece in pieces:
            shape, dim, start, length, run, stride, transposed, *rest = astuple(piece)
            entry = tensors.setdefault(
                name, {"shape": shape, "transposed": transposed, "pieces": []}
            )
            entry["pieces"].append([number, dim, start, length, run, stride, *rest])
    path = folder / INDEX
    path.write_text(
        json.dumps({"files": list(files), "states": list(states), "tensors": tensors}),
        encoding="utf-8",
    )
    return path


def flat_shard_key(piece: NamedFlatShard, state: str) -> str:
    """What a piece's tensor is called in its file."""
    return f"{piece.name}[{piece.piece.start}:{piece.piece.start + piece.piece.length}]/{state}"


class _Saved(NamedTuple):
    file: int
    piece: FlatShard


class OptimizerState:
    """A checkpoint's optimizer/ folder, opened for reading.

    Attributes:
        states: what is kept of each element, "master" among them.
        bytes_read: bytes of the elements that `fill` has copied.

    Raises CheckpointError for an index that is damaged, and pieces that are missing, damaged or there twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes_read = folder, 0
        if not (folder / INDEX).is_file():
            raise CheckpointError(
                f"{folder} has no {INDEX}: the checkpoint was written before there was one; "
                "start a new run from its weights with train.init_from"
            )
        try:
            content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self._names = [_plain(name) for name in content["files"]]
            self.states = [_text(state) for state in content["states"]]
            self._tensors = {
                name: [self._saved(entry, row) for row in entry["pieces"]]
                for name, entry in content["tensors"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{folder / INDEX} is damaged ({type(error).__name__} {str(error)[:120]})"
            ) from None
        self._files: dict[int, SafetensorsFile] = {}

    def _saved(self, entry: dict[str, Any], row: list[Any]) -> _Saved:
        shape = tuple(_count(size) for size in entry["shape"])
        file, dim, *numbers = row
        start, length, run, stride, extent, first, count = (_count(number) for number in numbers)
        if dim is not None:
            last = start + ((length // run - 1) * stride + run if run and length else length)
            if (
                not 0 <= _count(dim) < len(shape)
                or last > shape[dim]
                or extent < length
                or (run and (length % run or stride < run))
            ):
                raise ValueError("a piece is not inside its tensor")
            _count(math.prod(shape) * (extent + 1))
        if _count(file) >= len(self._names):
            raise ValueError("a piece is in a file that is not listed")
        return _Saved(
            file,
            FlatShard(
                shape,
                dim,
                start,
                length,
                run,
                stride,
                bool(entry["transposed"]),
                extent,
                first,
                count,
            ),
        )

    def names(self) -> set[str]:
        return set(self._tensors)

    @torch.no_grad()
    def fill(self, fragment: Fragment) -> None:
        """Write every element of the fragment's tensors, from whatever pieces hold it; padding is left as it is.

        Where only masters are kept, as of weights that were converted, moments begin at zero.
        """
        name, wanted = flat_shard_of(fragment)
        at_zero = set(fragment.tensors) - {"master"} if self.states == ["master"] else set()
        if set(fragment.tensors) - at_zero != set(self.states):
            raise CheckpointError(
                f"{self.folder} keeps {', '.join(self.states)} of each weight and this run keeps {', '.join(fragment.tensors)}"
            )
        sources = self._sources(name, wanted)
        for state, target in fragment.tensors.items():
            if state in at_zero:
                target.zero_()
                continue
            staged = target if target.device.type == "cpu" else target.cpu()
            for saved, copies in sources:
                _copy(
                    self._view(NamedFlatShard(name, saved.piece), saved.file, state), staged, copies
                )
                self.bytes_read += int(copies.length.sum()) * staged.element_size()
            if staged is not target:
                target.copy_(staged)

    def _sources(self, name: str, wanted: FlatShard) -> list[tuple[_Saved, CopyPlan]]:
        """The pieces that hold elements of the wanted one, which together hold all of it."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} holds nothing of {name}")
        target = intervals_of(wanted)
        sources = []
        for saved in self._tensors[name]:
            if saved.piece.shape != wanted.shape or saved.piece.transposed != wanted.transposed:
                raise CheckpointError(
                    f"{self.folder} holds {name} as {saved.piece.shape} and the model has it as {wanted.shape}"
                )
            copies = intersect(intervals_of(saved.piece), target)
            if copies.length.size:
                sources.append((saved, copies))
        if not covers(target, [copies for _, copies in sources]):
            raise CheckpointError(f"{self.folder} does not hold each element of {name} once")
        return sources

    def _view(self, piece: NamedFlatShard, file: int, state: str) -> Tensor:
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.folder / self._names[file])
        opened, key = self._files[file], flat_shard_key(piece, state)
        if key not in opened:
            raise CheckpointError(f"{opened.path} does not hold {key}, as {INDEX} says")
        view = opened.view(key)
        if view.dtype != torch.float32 or tuple(view.shape) != (piece.piece.count,):
            raise CheckpointError(
                f"{opened.path} holds {key} as {view.dtype} {tuple(view.shape)}, not as {INDEX} says"
            )
        return view


def _copy(source: Tensor, target: Tensor, copies: CopyPlan) -> None:
    for start, to, length in zip(*(numbers.tolist() for numbers in copies), strict=True):
        target[to : to + length] = source[start : start + length]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no natural number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _plain(value: Any) -> str:
    if _text(value) in ("", ".", "..") or Path(value).name != value or "\0" in value:
        raise ValueError(f"{value!r} is not the name of a file in the folder")
    return value
