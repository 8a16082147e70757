"""From a microbatch of tokens to the context that its layers read, on this rank's device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import ProcessMesh
from megatrain.models.config import TransformerConfig
from megatrain.models.microbatch import Microbatch
from megatrain.models.rope import Rotation, rotations
from megatrain.ops.dtypes import DTYPES
from megatrain.ops.random import random_key


class _Plain(NamedTuple):
    """What microbatches of one length share where all their sequences count from 0 and nothing parts their documents."""

    rotations: dict[str | None, Rotation]
    masks: dict[int | None, Tensor | None]


class MicrobatchFactory:
    """Makes the contexts of a run's microbatches; what all of them share is made once."""

    def __init__(
        self,
        config: Config,
        architecture: TransformerConfig,
        mesh: ProcessMesh,
        device: torch.device,
    ) -> None:
        self.config, self.architecture, self.mesh, self.device = config, architecture, mesh, device
        self._plain: dict[int, _Plain] = {}

    def make(self, batch: Batch, *, step: int | None, index: int) -> Microbatch:
        """Of this data rank's microbatch `index`; `step` is None in evaluation, which drops nothing out."""
        batch = Batch(*(field.to(self.device, non_blocking=True) for field in batch))
        parted = self.config.data.document_mask or self.config.data.packing
        dtype = DTYPES[self.config.train.dtype]
        shared = (
            _Plain(rotations(batch.positions, self.architecture, dtype), {})
            if parted
            else self._shared(batch.positions, dtype)
        )
        microbatch = index * self.mesh.data.size + self.mesh.data.rank
        return Microbatch(
            tokens=batch.tokens,
            labels=batch.labels,
            positions=batch.positions,
            documents=batch.documents if parted else None,
            rotations=shared.rotations,
            masks=shared.masks,
            dropout_key=None
            if step is None
            else random_key(self.config.run.seed, step, microbatch),
        )

    def _shared(self, positions: Tensor, dtype: torch.dtype) -> _Plain:
        """Of sequences as long as these, made once for each length; the last length's is kept."""
        length = positions.shape[1]
        if length not in self._plain:
            self._plain = {length: _Plain(rotations(positions[:1], self.architecture, dtype), {})}
        return self._plain[length]
