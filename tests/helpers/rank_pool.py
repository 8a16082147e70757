"""A pool of ranks that runs functions over gloo.

The ranks are processes that live as long as pytest, forked once libraries and tests are imported:
starting eight ranks costs more than most tests. A world of N has processes of its own, which have
all run the same functions: libraries number what they create, and compare these numbers.
A function is passed by reference, so it belongs to a module, and it must leave the process as it
found it.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


_worlds: dict[int, list[_Worker]] = {}


def _serve(pipe: Connection, parent: int) -> None:
    import torch

    from megatrain.distributed.device import disable_jit_extensions
    from megatrain.launch.local import die_with_parent

    die_with_parent(parent)  # the end of a pipe that its siblings hold too would not be seen
    torch.set_num_threads(1)
    disable_jit_extensions()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    while True:
        try:
            task = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        pipe.send_bytes(_answer(*task))


def _answer(rank: int, world_size: int, store: str, function: Any, args: tuple) -> bytes:
    import deepspeed.comm.comm
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
        )
        deepspeed.comm.comm.cdb = None  # it refers to the groups of the previous call
        result = function(rank, world_size, *args)
        dist.barrier()
        # Pickled here: a pipe of multiprocessing would hand tensors over as shared memory.
        return pickle.dumps((result, None))
    except BaseException:
        return pickle.dumps((None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()


def _world(size: int) -> list[_Worker]:
    if size not in _worlds:
        _worlds[size] = _start(size)
    return _worlds[size]


def _start(count: int) -> list[_Worker]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    import deepspeed  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401

    import megatrain.training.step_runner  # noqa: F401
    from megatrain.launch.local import import_before_fork

    import_before_fork()
    context = multiprocessing.get_context("fork")
    workers = []
    for _ in range(count):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, os.getpid()), daemon=True)
        process.start()
        there.close()
        workers.append(_Worker(process, here))
    return workers


@atexit.register
def stop() -> None:
    """Ends all ranks; the next call starts new ones."""
    for size in [*_worlds]:
        _stop(size)


def _stop(size: int) -> None:
    for worker in _worlds.pop(size):
        worker.process.kill()
        worker.process.join()


def run_ranks(
    function: Any, world_size: int, *args: Any, folder: Path, timeout: float = 300.0
) -> list[Any]:
    """Calls `function(rank, world_size, *args)` on every rank; returns the results by rank.

    Raises AssertionError with the traceback of the first rank that fails.
    """
    workers = _world(world_size)
    store = str(folder / f"store-{world_size}-{os.urandom(4).hex()}")
    for rank in range(world_size):
        workers[rank].pipe.send_bytes(pickle.dumps((rank, world_size, store, function, args)))
    results: dict[int, Any] = {}
    until = time.monotonic() + timeout
    while len(results) < world_size:
        waiting = {workers[rank].pipe: rank for rank in range(world_size) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, until - time.monotonic()))
        if not ready:
            _stop(world_size)
            raise AssertionError(
                f"ranks {sorted(waiting.values())} did not answer within {timeout:.0f} s"
            )
        for pipe in ready:
            try:
                result, error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                result, error = None, "its process is gone"
            if error is not None:
                _stop(world_size)  # the others may wait for it
                raise AssertionError(f"rank {waiting[pipe]}:\n{error}")
            results[waiting[pipe]] = result
    return [results[rank] for rank in range(world_size)]
