"""Runs a function on N forked ranks over gloo and returns what each returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def _main(rank, world_size, store, function, args, results):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    torch.set_num_threads(1)
    from megatrain.machine import forbid_builds

    try:
        with open(store + f".log{rank}", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        forbid_builds()
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
        # Pickled here: torch would hand tensors over as shared memory, which ends with this process.
        results.put((rank, pickle.dumps(function(rank, world_size, *args)), None))
        dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)


def run_ranks(function, world_size: int, *args, folder: Path, timeout: float = 300.0):
    """Results by rank; raises with the first failing rank's traceback."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401  imported once, before the forks
    import transformers.models.auto.modeling_auto  # noqa: F401

    import megatrain.train.trainer  # noqa: F401

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    store = str(folder / f"store-{world_size}-{os.urandom(4).hex()}")
    processes = [context.Process(target=_main, args=(rank, world_size, store, function, args, results)) for rank in range(world_size)]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < world_size:
            rank, value, error = results.get(timeout=timeout)
            if error is not None:
                raise AssertionError(f"rank {rank}:\n{error}")
            found[rank] = pickle.loads(value)
    finally:
        for process in processes:
            process.join(0 if len(found) < world_size else 20)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world_size)]
