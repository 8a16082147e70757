"""Memory as it was predicted and as it is, side by side: of the rank that takes most.

On a GPU what torch has allocated there at most. On CPUs the resident memory that the process has taken since its model was built, which
allocator, libraries and pages not given back make larger than what tensors hold; not known where the process had held more before, or
where the system does not tell.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from megatrain.distributed import device as device_module
from megatrain.distributed.mesh import ProcessMesh
from megatrain.pipeline.schedule import Schedule
from megatrain.planner.memory import heaviest, predict
from megatrain.planner.run_spec import RunSpec
from megatrain.text import GIB


class MemoryMonitor:
    """Made by all ranks before the model is built; `measure` is called by all of them together.

    Attributes:
        predicted: bytes of the heaviest rank, on rank 0; the others need not know.
    """

    def __init__(
        self,
        spec: RunSpec,
        mesh: ProcessMesh,
        device: torch.device,
        schedule: Schedule | None,
    ) -> None:
        self.device = device
        self.predicted = 0
        if mesh.rank == 0:
            ranks = predict(spec, schedule=schedule)
            self.predicted = ranks[heaviest(ranks)].total
        self._before, self._highest = (
            (0, 0)
            if device.type == "cuda"
            else (_resident(), device_module.peak_memory(device).size)
        )

    def measure(self) -> dict[str, float | None]:
        """GiB of the rank that has held most so far."""
        peak = device_module.peak_memory(self.device).size
        grown = 0 if self._before is None or peak <= self._highest else peak - self._before
        most = torch.tensor(grown, dtype=torch.int64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return {"memory_gib": int(most) / GIB or None, "memory_predicted_gib": self.predicted / GIB}


def _resident() -> int | None:
    """Bytes that the process has in memory now; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    except (OSError, ValueError, IndexError):
        return None
