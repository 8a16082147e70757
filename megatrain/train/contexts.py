"""From a microbatch of tokens to the context that its layers read, on this rank's device."""

from __future__ import annotations

import torch
from torch import Tensor

from megatrain.config import Config
from megatrain.data.loader import Batch
from megatrain.models.architecture import Architecture
from megatrain.models.context import Context
from megatrain.models.random import key
from megatrain.models.rotary import Rotation, rotations
from megatrain.optim.zero import DTYPES
from megatrain.parallel.grid import Grid


class Contexts:
    """Makes the contexts of a run's microbatches; what all of them share is made once."""

    def __init__(self, config: Config, architecture: Architecture, grid: Grid, device: torch.device) -> None:
        self.config, self.architecture, self.grid, self.device = config, architecture, grid, device
        self._plain_rotations: dict[int, dict[str | None, Rotation]] = {}

    def make(self, batch: Batch, *, step: int | None, index: int) -> Context:
        """Of this data rank's microbatch `index`; `step` is None in evaluation, which drops nothing out."""
        batch = Batch(*(field.to(self.device, non_blocking=True) for field in batch))
        masked = self.config.data.document_mask or self.config.data.packing
        microbatch = index * self.grid.data.size + self.grid.data.rank
        return Context(
            tokens=batch.tokens, labels=batch.labels, positions=batch.positions,
            documents=batch.documents if masked else None, rotations=self._rotations(batch.positions, shared=not masked),
            dropout_key=None if step is None else key(self.config.run.seed, step, microbatch),
        )  # fmt: skip

    def _rotations(self, positions: Tensor, *, shared: bool) -> dict[str | None, Rotation]:
        """Of the positions; where all sequences count from 0 alike, made once for each length."""
        dtype = DTYPES[self.config.train.dtype]
        if not shared:
            return rotations(positions, self.architecture, dtype)
        length = positions.shape[1]
        if length not in self._plain_rotations:
            self._plain_rotations = {length: rotations(positions[:1], self.architecture, dtype)}
        return self._plain_rotations[length]
