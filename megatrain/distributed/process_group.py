"""The default process group of torch.distributed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from megatrain.distributed import device as device_module
from megatrain.distributed.env import RankEnv, from_environment

if TYPE_CHECKING:
    from torch.distributed import Store

GROUP_TIMEOUT = timedelta(minutes=30)
"""Timeout of collectives.

The first step of a large run, a slow file system or a long evaluation on one rank must not exceed
it.
"""


def current_env() -> RankEnv:
    """Returns the rank of this process: the launcher's, that of its group, or the only one.

    Raises:
        UserError: the variables of the launcher are incomplete.
    """
    import torch.distributed as dist

    env = from_environment(os.environ)
    if env is not None:
        return env
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        return RankEnv(rank, size, rank, size, "127.0.0.1", 0)
    return RankEnv(0, 1, 0, 1, "127.0.0.1", 0)


def init_process_group(env: RankEnv, store: Store | None) -> None:
    """Joins the default group on the rank's device, NCCL on GPUs and gloo on CPUs.

    Args:
        store: connects the ranks; None uses MASTER_ADDR and MASTER_PORT.
    """
    import torch
    import torch.distributed as dist

    device = device_module.select_device(env)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        init_method="env://" if store is None else None,
        rank=env.rank,
        world_size=env.world_size,
        timeout=GROUP_TIMEOUT,
    )


@contextlib.contextmanager
def process_group(env: RankEnv) -> Iterator[None]:
    """Joins the default group around a block, unless the process is in one already.

    For processes that use the Python API. Environment variables that ranks need are restored
    afterwards.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    before = dict(os.environ)
    device_module.set_rank_environment(env)
    changed = [name for name, value in os.environ.items() if before.get(name) != value]
    device_module.disable_jit_extensions()
    init_process_group(env, dist.HashStore() if env.world_size == 1 else None)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name in changed:
            os.environ.pop(name, None)
            os.environ |= {name: before[name]} if name in before else {}
