"""An optimizer that discards gradients, used while schedules are measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatrain.optim.zero import StepResult, ZeroOptimizer


class NullOptimizer(ZeroOptimizer):
    """Accumulates gradients in fp32 as a training run does and discards them.

    It has no DeepSpeed engine, masters or moments.
    """

    def __init__(self, stage: nn.Module, *, dtype: torch.dtype, **_: Any) -> None:
        self.stage, self.dtype = stage.to(dtype), dtype
        self.partitions_gradients = self._has_own_main_grads = False
        self.trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        self._attach_main_grads()

    @property
    def _scaler(self) -> None:
        return None

    def step(self, lr: float) -> StepResult:
        """Discards the gradients."""
        self.zero_grad()
        return StepResult(0.0, True)
