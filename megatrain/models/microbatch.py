"""What every layer may need to know of the microbatch it works on, beside what flows from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatrain.models.rope import Rotation
from megatrain.ops.random import random_key


@dataclass
class Microbatch:
    """One microbatch on one rank. B micro-batch, S sequence.

    Attributes:
        tokens, labels, positions: int64 [B, S]; label -100 has no loss.
        documents: int64 [B, S], ordinal of each token's document in its sample, when attention stays within
            documents; else None.
        rotations: cosines and sines of the positions for each kind of layer, for models with rotary positions.
        dropout_key: of (seed, step, microbatch); layers derive theirs from it. None in evaluation.
        adapters: whether low-rank adapters add to what they stand beside; without them the model is the one that they began from.
        reference: fp32 [B], log-probabilities that the objective compares with.
        log_probs, measured: left here by the objective, on the last stage alone; see `objective.py`.
        masks: those made so far, by window; contexts whose masks are the same may share them.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor | None = None
    rotations: dict[str | None, Rotation] = field(default_factory=dict)
    dropout_key: int | None = None
    adapters: bool = True
    reference: Tensor | None = None
    log_probs: Tensor | None = None
    measured: Tensor | None = None
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """bool [B or 1, 1, S, S], true where attention is allowed; None when plain causal attention is meant.

        A window of w tokens sees the token itself and the w - 1 before it, as in transformers.
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

    def mask_key(self, *place: object) -> int:
        return random_key("dropout", self.dropout_key, *place)
