"""The optimizer/ folder of a checkpoint: masters and moments of each tensor, in pieces, by name.

    optimizer/
      index.json                    files, states, and the pieces of each tensor: file and elements
      rank-00000.safetensors ...    "NAME[START:STOP]/STATE", fp32 [n], for each piece of the rank

Each element of a tensor is in one piece; copies on other ranks are not written. A reader on any
layout finds the files and elements that it needs in the index, and reads only those.
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

from megatrain.checkpoint.hf_folder import is_file_name
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
from megatrain.optim.zero_state import Fragment

INDEX = "index.json"


class NamedFlatShard(NamedTuple):
    """A piece of the tensor `name`."""

    name: str
    piece: FlatShard


class OptimizerSnapshot(NamedTuple):
    """A rank's pieces, and copies of their tensors in CPU memory by key."""

    pieces: list[NamedFlatShard]
    tensors: dict[str, Tensor]


def flat_shard_of(fragment: Fragment) -> NamedFlatShard:
    """Returns the piece that a fragment covers."""
    count = next(iter(fragment.tensors.values())).numel()
    spec = fragment.sharding
    return NamedFlatShard(spec.name, make_flat_shard(spec, fragment.shape, fragment.start, count))


def flat_shard_key(piece: NamedFlatShard, state: str) -> str:
    """Returns the name of a piece's tensor in its file."""
    return f"{piece.name}[{piece.piece.start}:{piece.piece.start + piece.piece.length}]/{state}"


def copy_fragments(fragments: Iterable[Fragment]) -> OptimizerSnapshot:
    """Copies the fragments that this rank owns, and therefore writes, to CPU memory."""
    pieces, tensors = [], {}
    for fragment in fragments:
        if fragment.sharding.is_owner:
            piece = flat_shard_of(fragment)
            pieces.append(piece)
            for state, tensor in fragment.tensors.items():
                copy = tensor.detach().to("cpu", copy=True).contiguous()
                tensors[flat_shard_key(piece, state)] = copy
    return OptimizerSnapshot(pieces, tensors)


def write_index(
    folder: Path, files: Mapping[str, list[NamedFlatShard]], states: Iterable[str]
) -> Path:
    """Writes the index of files by name, each with its pieces."""
    tensors: dict[str, dict[str, Any]] = {}
    for number, pieces in enumerate(files.values()):
        for name, piece in pieces:
            shape, dim, start, length, block, stride, transposed, *rest = astuple(piece)
            entry = tensors.setdefault(
                name, {"shape": shape, "transposed": transposed, "pieces": []}
            )
            entry["pieces"].append([number, dim, start, length, block, stride, *rest])
    path = folder / INDEX
    content = {"files": list(files), "states": list(states), "tensors": tensors}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


class _Saved(NamedTuple):
    file: int
    piece: FlatShard


class OptimizerState:
    """A checkpoint's optimizer/ folder, opened for reading.

    Attributes:
        states: names of the tensors kept of each weight, "master" among them.
        bytes_read: bytes of the elements that `load` has copied.

    Raises CheckpointError if the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes_read = folder, 0
        if not (folder / INDEX).is_file():
            raise CheckpointError(
                f"{folder} has no {INDEX}: the checkpoint is of an old format; start a new run "
                "from its weights with train.init_from",
                fix={"train.init_from": str(folder.parent), "checkpoint.resume": "never"},
            )
        try:
            content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self._file_names = [_file_name(name) for name in content["files"]]
            self.states = [_text(state) for state in content["states"]]
            self._tensors = {
                name: [self._parse_piece(entry, row) for row in entry["pieces"]]
                for name, entry in content["tensors"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{folder / INDEX} is damaged ({type(error).__name__} {str(error)[:120]})"
            ) from None
        self._files: dict[int, SafetensorsFile] = {}

    def _parse_piece(self, entry: dict[str, Any], row: list[Any]) -> _Saved:
        """Returns a row of the index as a piece; raises ValueError if it cannot be one."""
        shape = tuple(_count(size) for size in entry["shape"])
        file, dim, *numbers = row
        start, length, block, stride, extent, first, count = (_count(n) for n in numbers)
        if dim is not None:
            whole_blocks = (length // block - 1) * stride + block if block and length else length
            is_inside = _count(dim) < len(shape) and start + whole_blocks <= shape[dim]
            is_regular = not block or (length % block == 0 and stride >= block)
            if not is_inside or not is_regular or extent < length:
                raise ValueError("a piece is outside its tensor")
            _count(math.prod(shape) * (extent + 1))
        if _count(file) >= len(self._file_names):
            raise ValueError("a piece is in a file that is not listed")
        transposed = bool(entry["transposed"])
        piece = FlatShard(
            shape, dim, start, length, block, stride, transposed, extent, first, count
        )
        return _Saved(file, piece)

    def names(self) -> set[str]:
        """Returns the names of all tensors."""
        return set(self._tensors)

    @torch.no_grad()
    def load(self, fragment: Fragment) -> None:
        """Writes every element of the fragment's tensors; padding is not changed.

        If only masters are stored, as in converted weights, moments start at zero.

        Raises CheckpointError if elements are missing, damaged or there twice.
        """
        name, target_piece = flat_shard_of(fragment)
        at_zero = set(fragment.tensors) - {"master"} if self.states == ["master"] else set()
        if set(fragment.tensors) - at_zero != set(self.states):
            raise CheckpointError(
                f"{self.folder} contains {', '.join(self.states)} of each weight and this run has "
                f"{', '.join(fragment.tensors)}"
            )
        sources = self._sources(name, target_piece)
        for state, target in fragment.tensors.items():
            if state in at_zero:
                target.zero_()
                continue
            staged = target if target.device.type == "cpu" else target.cpu()
            for saved, copies in sources:
                self._copy(NamedFlatShard(name, saved.piece), saved.file, state, staged, copies)
            if staged is not target:
                target.copy_(staged)

    def _sources(self, name: str, target: FlatShard) -> list[tuple[_Saved, CopyPlan]]:
        """Returns the pieces that together hold all elements of the target, with copy plans."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} lacks {name}")
        wanted = intervals_of(target)
        sources = []
        for saved in self._tensors[name]:
            if saved.piece.shape != target.shape or saved.piece.transposed != target.transposed:
                raise CheckpointError(
                    f"{self.folder} contains {name} of shape {saved.piece.shape} and the model's "
                    f"has {target.shape}"
                )
            copies = intersect(intervals_of(saved.piece), wanted)
            if copies.length.size:
                sources.append((saved, copies))
        if not covers(wanted, [copies for _, copies in sources]):
            raise CheckpointError(f"{self.folder} must contain each element of {name} once")
        return sources

    def _copy(
        self, piece: NamedFlatShard, file: int, state: str, target: Tensor, copies: CopyPlan
    ) -> None:
        opened, key = self._open(file), flat_shard_key(piece, state)
        if key not in opened:
            raise CheckpointError(f"{opened.path} lacks {key}, which {INDEX} lists for it")
        dtype, shape = opened.dtype(key), opened.shape(key)
        if dtype != torch.float32 or shape != (piece.piece.count,):
            raise CheckpointError(
                f"{opened.path} contains {key} as {dtype} {shape}, not as {INDEX} describes it"
            )
        source = opened.view(key)
        for start, to, length in zip(*(numbers.tolist() for numbers in copies), strict=True):
            target[to : to + length] = source[start : start + length]
        opened.release(key)
        self.bytes_read += int(copies.length.sum()) * target.element_size()

    def _open(self, file: int) -> SafetensorsFile:
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.folder / self._file_names[file])
        return self._files[file]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} must be an integer of at least 0")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be a string")
    return value


def _file_name(value: Any) -> str:
    if not is_file_name(value):
        raise ValueError(f"{value!r} must be the name of a file in the folder")
    return value
