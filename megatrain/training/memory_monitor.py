"""The measured and the predicted memory of the rank that takes most.

On GPUs the measured memory is the peak that torch has allocated. On CPUs it is the growth of the
process's resident memory since the model was built. The allocator, libraries and pages that were
not returned make it larger than the tensors. It is unknown if the process held more before, or if
the system does not report it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatrain.distributed import device as device_module
from megatrain.distributed.mesh import ProcessMesh
from megatrain.pipeline.schedule import Schedule
from megatrain.planner.memory import heaviest, predict
from megatrain.planner.run_spec import RunSpec
from megatrain.telemetry.metrics import Value
from megatrain.text import GIB
from megatrain.training.callback import Callback

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepReport
    from megatrain.training.trainer import Trainer


class MemoryMonitor(Callback):
    """Adds `memory_gib` and `memory_predicted_gib` to the metrics every `every` steps.

    All ranks create it before the model is built.

    Attributes:
        predicted: bytes of the rank that takes most; computed on rank 0 alone.
    """

    def __init__(
        self,
        spec: RunSpec,
        mesh: ProcessMesh,
        device: torch.device,
        schedule: Schedule | None,
    ) -> None:
        self.device, self.every = device, spec.config.train.log_every
        self.predicted = 0
        if mesh.rank == 0:
            ranks = predict(spec, schedule=schedule)
            self.predicted = ranks[heaviest(ranks)].total
        self._before: int | None = 0
        self._peak_before = 0
        if device.type != "cuda":
            self._before = _resident_bytes()
            self._peak_before = device_module.peak_memory(device).size

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Measures the memory at steps that are logged."""
        if trainer.is_due(trainer.state.step, self.every):
            with trainer.activity.collective("measuring memory in the", trainer.mesh.world):
                metrics.update(self.measure())

    def measure(self) -> dict[str, float | None]:
        """Returns the GiB of the rank that has held most so far; all ranks call it."""
        peak = device_module.peak_memory(self.device).size
        is_known = self._before is not None and peak > self._peak_before
        used = peak - (self._before or 0) if is_known else 0
        most = torch.tensor(used, dtype=torch.int64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return {"memory_gib": int(most) / GIB or None, "memory_predicted_gib": self.predicted / GIB}


def _resident_bytes() -> int | None:
    """Returns the resident memory of the process; None if the system does not report it."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
