"""Turns a written Hugging Face folder into a checkpoint that a run resumes from.

It adds fp32 master weights, the optimizer's moments if the source has them, the train state and a
manifest. The flat shards are those that a single rank would write; any layout reads its own from
them. Without moments, a run starts with zero moments, as at step 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from megatrain.checkpoint import manifest
from megatrain.checkpoint.optimizer_state import NamedFlatShard, flat_shard_key, write_index
from megatrain.checkpoint.tensor_io import Index, SafetensorsFile
from megatrain.checkpoint.train_state import RunDescription, TrainState, write_train_state
from megatrain.conversion.sources import Source, TensorReader
from megatrain.conversion.verify import compare_bytes, read_parameter
from megatrain.conversion.writer import BackgroundSync, write_file
from megatrain.distributed.reshard import make_flat_shard
from megatrain.distributed.sharding import parameters, shard_spec
from megatrain.models.config import TransformerConfig
from megatrain.models.transformer import build_meta_model

_MAX_FILE_BYTES = 5 * 10**9


class Moments(NamedTuple):
    """The optimizer state of a source: tensors by state, and the number of updates."""

    states: dict[str, TensorReader]
    updates: int


@runtime_checkable
class HasMoments(Protocol):
    """A source with optimizer state."""

    def moments(self) -> Moments: ...


class _StoredShard(NamedTuple):
    parameter: nn.Parameter
    tensors: TensorReader


class OptimizerFiles:
    """The `optimizer/` folder of a source; a reader of its flat shards by key.

    Attributes:
        states: the names of its states, masters first.
        updates: the number of updates that the moments contain.
        num_bytes: the size of all shards.
    """

    def __init__(self, source: Source, architecture: TransformerConfig) -> None:
        moments = source.moments() if isinstance(source, HasMoments) else Moments({}, 0)
        states: dict[str, TensorReader] = {"master": source, **moments.states}
        self.states, self.updates = list(states), moments.updates
        self._stored: dict[str, _StoredShard] = {}
        self._files: dict[str, list[NamedFlatShard]] = {}
        self._cached: tuple[str, Tensor] | None = None
        self.num_bytes, in_file = 0, _MAX_FILE_BYTES
        for spec, parameter in parameters(build_meta_model(architecture)):
            whole = make_flat_shard(spec, tuple(parameter.shape), 0, parameter.numel())
            shard = NamedFlatShard(spec.name, whole)
            size = 4 * parameter.numel() * len(states)
            if in_file + size > _MAX_FILE_BYTES:
                self._files[f"rank-{len(self._files):05d}.safetensors"] = []
                in_file = 0
            next(reversed(self._files.values())).append(shard)
            in_file += size
            self.num_bytes += size
            for state, tensors in states.items():
                self._stored[flat_shard_key(shard, state)] = _StoredShard(parameter, tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return (self._stored[key].parameter.numel(),)

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """Returns fp32 elements of a flat shard, in the order of its parameter."""
        if self._cached is None or self._cached[0] != key:
            self._cached = None  # frees it first
            parameter, tensors = self._stored[key]
            values = read_parameter(tensors, shard_spec(parameter)).float()
            self._cached = (key, values.contiguous().view(-1))
        return self._cached[1][index or ()]

    def write(self, folder: Path, *, on_write: Callable[[int], None], sync: BackgroundSync) -> None:
        """Writes all files and their index."""
        optimizer = folder / "optimizer"
        optimizer.mkdir()
        for file in self._files:
            write_file(optimizer / file, self._keys(file), self, on_write=on_write, sync=sync)
        write_index(optimizer, self._files, self.states)

    def verify(self, folder: Path) -> None:
        """Raises CheckpointError if a written shard differs from the source."""
        for file in self._files:
            written = _ReadableFile(folder / "optimizer" / file)
            compare_bytes(written, self, self._keys(file), written.path)

    def finish(self, folder: Path, source: Source) -> None:
        """Writes the manifest and a train state that fixes no setting of the resumed run."""
        state = TrainState(self.updates, 0, self.updates)
        sections = ("run", "data", "parallel", "train", "optimizer")
        config: dict[str, Any] = {name: {} for name in sections}
        write_train_state(folder, state, RunDescription({}, config, source.config.to_dict()))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest.write(folder, [manifest.make_record(folder, path) for path in files])

    def _keys(self, file: str) -> list[str]:
        return [
            flat_shard_key(shard, state) for shard in self._files[file] for state in self.states
        ]


class _ReadableFile(SafetensorsFile):
    """A file of flat shards as a reader."""

    def read(self, name: str, index: Index | None = None) -> Tensor:
        part = self.view(name)[index or ()].clone()
        self.release(name)
        return part
