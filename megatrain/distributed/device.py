"""What this machine gives a rank: its device, its share of the cores, and the environment that libraries read.

deepspeed picks its accelerator once, when it is first imported, and OpenMP reads its threads when torch is. So entry
points call `set_environment` before they import either.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatrain.distributed.env import RankEnv
from megatrain.distributed.huge_pages import use_huge_pages
from megatrain.errors import UserError

if TYPE_CHECKING:
    import torch


def has_gpu() -> bool:
    """Whether ranks of this machine train on GPUs. Looks without initialising CUDA: that forbids forks."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in (
        "",
        "-1",
    ):
        return False
    # NVIDIA, AMD and Windows' Linux subsystem.
    if not (
        any(Path("/dev").glob("nvidia[0-9]*"))
        or Path("/dev/kfd").exists()
        or Path("/dev/dxg").exists()
    ):
        return False
    import torch

    return torch.backends.cuda.is_built()


def select_device(place: RankEnv) -> torch.device:
    """The device of the rank at `place`; raises UserError when its machine shows too few GPUs."""
    import torch

    if not has_gpu():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and "SLURM_STEP_ID" in os.environ:
        return torch.device("cuda", 0)  # srun --gpus-per-task shows each task its own GPU only
    if place.local_rank >= count:
        raise UserError(
            f"{place.local_size} ranks were started on this machine and it shows {count} GPUs: start one rank per GPU"
        )
    return torch.device("cuda", place.local_rank)


def set_environment(ranks_here: int) -> None:
    """Set what deepspeed and OpenMP read at import; what the user has set stays."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // ranks_here)))


def set_rank_environment(place: RankEnv) -> None:
    """Set what torch and deepspeed read in a rank, and torch's threads, as it may be imported already; its heap, on CPUs."""
    set_environment(place.local_size)
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
    }
    if place.master_addr in ("127.0.0.1", "localhost") and Path("/sys/class/net/lo").exists():
        # All ranks are here, and a machine's own name need not resolve to an address it can reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
    if not has_gpu():
        use_huge_pages(_available_memory() // place.local_size)


def disable_jit_extensions() -> None:
    """Keep deepspeed from compiling its shared-memory collectives when a group starts on CPUs.

    The build takes a compiler and a minute, and one that was killed leaves a lock on which every later start hangs.
    """
    if has_gpu():
        return
    import deepspeed

    # Written to after deepspeed's own probing, which fills the mapping on first access.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def free_memory(device: torch.device, ranks_here: int) -> int:
    """Bytes that a rank could still take: of its GPU, or its share of this machine's memory."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _available_memory() // ranks_here


def _available_memory() -> int:
    """Of the machine, what is not in use; half of all where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class MemoryStats(NamedTuple):
    """What a rank has held at most, in bytes, and what exactly that counts."""

    size: int
    meaning: str


def reset_peak_memory(device: torch.device) -> None:
    """Have `peak_memory` begin anew, where there is a way: on a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> MemoryStats:
    """Of this process."""
    import torch

    if device.type == "cuda":
        return MemoryStats(
            torch.cuda.max_memory_allocated(device), "allocated on the GPU during the step"
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return MemoryStats(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "resident memory of the process since its start",
    )
