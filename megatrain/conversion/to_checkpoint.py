"""What makes a Hugging Face folder a checkpoint that a run resumes: masters, moments where there are any, train_state.json, a manifest.

The optimizer's pieces are those that one rank alone would write, so that any layout reads its own from them. Without moments only
masters are kept, and a run begins with moments of zero, as after no step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from megatrain.checkpoint import manifest
from megatrain.checkpoint.optimizer_state import NamedFlatShard, flat_shard_key, write_index
from megatrain.checkpoint.tensor_io import Index, SafetensorsFile
from megatrain.checkpoint.train_state import FILE_NAME, TrainState
from megatrain.conversion.logits import read_declared, whole_model
from megatrain.conversion.sources import Readable, Source
from megatrain.conversion.verify import check_bytes
from megatrain.conversion.writer import BackgroundSync, write_file
from megatrain.distributed.reshard import make_flat_shard
from megatrain.distributed.sharding import parameters, shard_spec
from megatrain.models.config import TransformerConfig

FILE_BYTES = 5 * 10**9


class Moments(NamedTuple):
    """The optimizer's state that a source holds beside its weights: tensors by state, and updates so far."""

    states: dict[str, Readable]
    updates: int


@runtime_checkable
class HasMoments(Protocol):
    """A source that has more than weights."""

    def moments(self) -> Moments: ...


class _Home(NamedTuple):
    piece: NamedFlatShard
    parameter: nn.Parameter
    tensors: Readable


class OptimizerFiles:
    """The optimizer/ folder of a source, written piece by piece.

    Attributes:
        num_bytes: of all that `write` will write.
    """

    def __init__(self, source: Source, architecture: TransformerConfig) -> None:
        self.moments = source.moments() if isinstance(source, HasMoments) else Moments({}, 0)
        self._homes: dict[str, _Home] = {}
        self._files: dict[str, list[NamedFlatShard]] = {}
        self._last: tuple[str, Tensor] | None = None
        self.num_bytes, in_file = 0, FILE_BYTES
        states = {"master": source, **self.moments.states}
        for declaration, parameter in parameters(whole_model(architecture)):
            piece = NamedFlatShard(
                declaration.name,
                make_flat_shard(declaration, tuple(parameter.shape), 0, parameter.numel()),
            )
            size = 4 * parameter.numel() * len(states)
            if in_file + size > FILE_BYTES:
                self._files[f"rank-{len(self._files):05d}.safetensors"] = []
                in_file = 0
            next(reversed(self._files.values())).append(piece)
            in_file += size
            self.num_bytes += size
            for state, tensors in states.items():
                self._homes[flat_shard_key(piece, state)] = _Home(piece, parameter, tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return (self._homes[key].parameter.numel(),)

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """Of a piece's elements, in the order of the parameter that it is."""
        if self._last is None or self._last[0] != key:
            self._last = None
            home = self._homes[key]
            self._last = (
                key,
                read_declared(home.tensors, shard_spec(home.parameter))
                .float()
                .contiguous()
                .view(-1),
            )
        return self._last[1][index or ()]

    def _keys(self, file: str) -> list[str]:
        states = ["master", *self.moments.states]
        return [flat_shard_key(piece, state) for piece in self._files[file] for state in states]

    def write(self, folder: Path, *, wrote: Callable[[int], None], catcher: BackgroundSync) -> None:
        """Write all files and their index."""
        home = folder / "optimizer"
        home.mkdir()
        for file in self._files:
            write_file(home / file, self._keys(file), self, wrote=wrote, catcher=catcher)
        write_index(home, self._files, ["master", *self.moments.states])

    def check(self, folder: Path) -> None:
        """Read back every piece."""
        for file in self._files:
            written = _Written(folder / "optimizer" / file)
            check_bytes(written, self, self._keys(file), written.path)

    def finish(self, folder: Path, source: Source) -> None:
        """train_state.json and the manifest. No setting of a run is in it that a resume would have to keep."""
        progress = TrainState(self.moments.updates, 0, self.moments.updates)
        trainer: dict[str, Any] = {
            **progress._asdict(),
            "layout": {},
            "config": {name: {} for name in ("run", "data", "parallel", "train", "optimizer")},
            "model": source.config.to_dict(),
        }
        (folder / FILE_NAME).write_text(
            json.dumps(trainer, indent=1, default=str), encoding="utf-8"
        )
        records = [manifest.make_record(folder, path) for path in _files(folder)]
        manifest.write(folder, records)


class _Written(SafetensorsFile):
    """A file of pieces, to be read back."""

    def read(self, name: str, index: Index | None = None) -> Tensor:
        part = self.view(name)[index or ()].clone()
        self.release(name)
        return part


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
