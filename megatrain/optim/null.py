"""Stands where the optimizer does while a run is only measured: gradients are made as in the run, and thrown away."""

from __future__ import annotations

from torch import nn

from megatrain.config.loader import Config
from megatrain.distributed.mesh import ProcessMesh
from megatrain.ops.dtypes import DTYPES
from megatrain.optim.zero import StepResult, ZeroOptimizer


class NullOptimizer(ZeroOptimizer):
    """A stage in the run's dtype whose gradients accumulate in fp32 and change nothing; without DeepSpeed, masters and states."""

    def __init__(
        self, stage: nn.Module, *, config: Config, mesh: ProcessMesh, microbatches: int
    ) -> None:
        self.config, self.mesh, self.partitioned = config, mesh, False
        self.stage = stage.to(DTYPES[config.train.dtype])
        self.trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        self._take_main_grads()

    _bf16 = False

    @property
    def loss_scale(self) -> float:
        return 1.0

    @property
    def _scaler(self) -> None:
        return None

    def step(self, lr: float) -> StepResult:
        """In place of an update."""
        self.zero_grad()
        return StepResult(0.0, True)
