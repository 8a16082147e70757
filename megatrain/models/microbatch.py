"""Microbatches: the inputs that all layers of a stage can read, beside the hidden states.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import ProcessMesh
from megatrain.models.config import TransformerConfig
from megatrain.models.rope import rotations
from megatrain.ops.random import random_key
from megatrain.ops.rope import Rotation

Masks = dict[int | None, Tensor | None]
"""Attention masks by window."""


@dataclass
class Microbatch:
    """One microbatch on one rank.

    Attributes:
        tokens, positions: int64 [B, S].
        labels: int64 [B, S]; -100 marks tokens without a loss.
        documents: int64 [B, S], the number of each token's document in its sample, if attention
            stays within documents; otherwise None.
        rotations: rotations of the positions by kind of layer, for models with rotary positions.
        dropout_key: key of (seed, step, microbatch), from which layers derive theirs; None in
            evaluation.
        targets: fp32 [B, labels], for classifiers whose targets are not one class: 0 and 1 for each
            class, or values. The labels mark the token of each text that has them.
        adapters: False disables low-rank adapters, which leaves the base model.
        reference: fp32 [B], log-probabilities of the reference model, for the objective.
        log_probs, measured: results that the objective stores on the last stage; see `losses.py`.
        masks: attention masks computed so far; microbatches with the same masks may share them.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor | None = None
    rotations: dict[str | None, Rotation] = field(default_factory=dict)
    dropout_key: int | None = None
    targets: Tensor | None = None
    adapters: bool = True
    reference: Tensor | None = None
    log_probs: Tensor | None = None
    measured: Tensor | None = None
    masks: Masks = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """Returns the mask bool [B or 1, 1, S, S], True where attention is allowed.

        Returns None for plain causal attention. A window of w tokens includes the token itself and
        the w - 1 before it, as in transformers.
        """
        length = self.tokens.shape[1]
        if window is not None and window >= length:
            window = None
        if window not in self.masks:
            self.masks[window] = self._make_mask(window, length)
        return self.masks[window]

    def _make_mask(self, window: int | None, length: int) -> Tensor | None:
        if window is None and self.documents is None:
            return None
        index = torch.arange(length, device=self.tokens.device)
        distance = index[:, None] - index[None, :]
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        if self.documents is None:
            return allowed[None, None]
        return (allowed & (self.documents[:, :, None] == self.documents[:, None, :]))[:, None]

    def mask_key(self, *position: object) -> int:
        """Returns the key of the dropout mask of a position in the model, such as a layer's."""
        return random_key("dropout", self.dropout_key, *position)


class _Shared(NamedTuple):
    """Tensors that microbatches of one length share if their positions do not restart."""

    rotations: dict[str | None, Rotation]
    masks: Masks


class MicrobatchFactory:
    """Creates the microbatches of a run on this rank's device.

    Args:
        dtype: the dtype of rotations.
        separate_documents: attention stays within documents, and positions restart (document mask,
            packing).
        seed: the run's seed, for dropout.
    """

    def __init__(
        self,
        architecture: TransformerConfig,
        mesh: ProcessMesh,
        device: torch.device,
        *,
        dtype: torch.dtype,
        separate_documents: bool,
        seed: int,
    ) -> None:
        self.architecture, self.mesh, self.device = architecture, mesh, device
        self.dtype, self.separate_documents, self.seed = dtype, separate_documents, seed
        self._shared: dict[int, _Shared] = {}

    def make(self, batch: Batch, *, step: int | None, index: int) -> Microbatch:
        """Returns microbatch `index` of this data rank; `step` is None in evaluation (no
        dropout)."""
        batch = Batch(*(None if x is None else x.to(self.device, non_blocking=True) for x in batch))
        if self.separate_documents:
            shared = _Shared(rotations(batch.positions, self.architecture, self.dtype), {})
        else:
            shared = self._share(batch.positions)
        number = index * self.mesh.data.size + self.mesh.data.rank
        return Microbatch(
            tokens=batch.tokens,
            labels=batch.labels,
            positions=batch.positions,
            documents=batch.documents if self.separate_documents else None,
            targets=batch.targets,
            rotations=shared.rotations,
            masks=shared.masks,
            dropout_key=None if step is None else random_key(self.seed, step, number),
        )

    def _share(self, positions: Tensor) -> _Shared:
        """Returns the shared tensors of sequences of this length; only the last length's are
        kept."""
        length = positions.shape[1]
        if length not in self._shared:
            tensors = rotations(positions[:1], self.architecture, self.dtype)
            self._shared = {length: _Shared(tensors, {})}
        return self._shared[length]
