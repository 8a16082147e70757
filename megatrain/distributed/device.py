"""The device of a rank, its CPU threads, its memory, and the environment that libraries read.

deepspeed selects its accelerator when it is first imported, and OpenMP its number of threads when
torch is. Entry points therefore call `set_environment` before they import either.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatrain.distributed.env import RankEnv
from megatrain.errors import UserError

if TYPE_CHECKING:
    import torch


def has_gpu() -> bool:
    """Returns True if ranks of this machine train on GPUs.

    Does not initialise CUDA, which forbids forks.
    """
    hides_gpus = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hides_gpus or os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    # Devices of NVIDIA, AMD and Windows Subsystem for Linux.
    has_device = (
        any(Path("/dev").glob("nvidia[0-9]*"))
        or Path("/dev/kfd").exists()
        or Path("/dev/dxg").exists()
    )
    if not has_device:
        return False
    import torch

    return torch.backends.cuda.is_built()


def select_device(env: RankEnv) -> torch.device:
    """Returns the device of a rank; raises UserError if its machine has too few GPUs."""
    import torch

    if not has_gpu():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and "SLURM_STEP_ID" in os.environ:
        return torch.device("cuda", 0)  # srun --gpus-per-task shows each task only its own GPU
    if env.local_rank >= count:
        raise UserError(
            f"{env.local_size} ranks were started on this machine, which has {count} GPUs; start "
            "one rank per GPU"
        )
    return torch.device("cuda", env.local_rank)


def set_environment(ranks_here: int) -> None:
    """Sets what deepspeed and OpenMP read at import, unless the user has set it."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // ranks_here)))


def set_rank_environment(env: RankEnv) -> None:
    """Sets what torch and deepspeed read in a rank, torch's threads, and on CPUs the heap."""
    set_environment(env.local_size)
    os.environ |= {
        "RANK": str(env.rank),
        "WORLD_SIZE": str(env.world_size),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.local_size),
        "MASTER_ADDR": env.master_addr,
        "MASTER_PORT": str(env.master_port),
    }
    if env.master_addr in ("127.0.0.1", "localhost") and Path("/sys/class/net/lo").exists():
        # All ranks are local; the machine's own name may resolve to an unreachable address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
    if not has_gpu():
        use_huge_pages(_available_memory() // env.local_size)


def disable_jit_extensions() -> None:
    """Keeps deepspeed from compiling its shared-memory collectives when a group starts on CPUs.

    The build requires a compiler and a minute. A killed build leaves a lock on which every later
    start hangs.
    """
    if has_gpu():
        return
    import deepspeed

    # Set after deepspeed's own detection, which fills the mapping at its first access.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def cpu_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device, ranks_here: int) -> int:
    """Returns the bytes that a rank can still allocate: of its GPU, or its share of the machine."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _available_memory() // ranks_here


def _available_memory() -> int:
    """Returns the unused bytes of the machine; half of its memory if that is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class MemoryStats(NamedTuple):
    """The peak memory of a rank in bytes, and the kind of memory that it counts."""

    size: int
    meaning: str


def reset_peak_memory(device: torch.device) -> None:
    """Resets `peak_memory` on GPUs; CPUs have no way to."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> MemoryStats:
    """Returns the peak memory of this process."""
    import torch

    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        return MemoryStats(peak, "allocated on the GPU during the step")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryStats(peak, "resident memory of the process since its start")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_HUGE_PAGE = 2 << 20
_BLOCK = 1 << 30
"""Bytes of one allocation: a request for more than the machine has is refused as a whole."""


def use_huge_pages(size: int) -> None:
    """Backs up to `size` bytes of the heap with huge pages and disables returning memory.

    A step frees and allocates the same gigabytes again and again. glibc returns large blocks to
    the system at once. The system then clears each page of 4 KiB at its next use, and so many pages
    exceed a processor's TLB. The heap therefore keeps freed memory, in pages of 2 MiB where the
    system has them on request (Linux, transparent_hugepage "madvise").

    The addresses become memory as they are used. Without glibc, or with a limit on addresses,
    nothing changes.
    """
    libc = ctypes.CDLL(None)
    is_limited = any(
        resource.getrlimit(limit)[0] != resource.RLIM_INFINITY
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    )
    if is_limited or not hasattr(libc, "mallopt") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, (1 << 31) - 1)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    blocks = []
    for _ in range(size // _BLOCK):
        block = libc.malloc(_BLOCK)
        if not block:
            break
        blocks.append(block)
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        length = (block + _BLOCK - start) // _HUGE_PAGE * _HUGE_PAGE
        libc.madvise(start, length, mmap.MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)
