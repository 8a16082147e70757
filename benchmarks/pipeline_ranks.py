"""Rank processes in which the contenders of benchmarks/pipeline.py take turns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

RunStep = Callable[[], Any]
"""One step of a contender; its result is sent to the parent process."""


class Ranks:
    """Rank processes over gloo with one thread each, which run laps of contenders by name.

    Args:
        make: (rank, ranks, **arguments) -> contenders by name, run in each process.
    """

    def __init__(
        self, ranks: int, make: Callable[..., dict[str, RunStep]], **arguments: Any
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for rank in range(ranks):
            parent_end, child_end = context.Pipe()
            process = context.Process(
                target=serve, args=(child_end, store, rank, ranks, make, arguments), daemon=True
            )
            process.start()
            self.pipes.append(parent_end)
            self.processes.append(process)
        self._answers()

    def lap(self, name: str) -> list[Any]:
        """Runs a lap of a contender; returns its results by rank."""
        for pipe in self.pipes:
            pipe.send(name)
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for pipe in self.pipes:
            answer, error = pipe.recv()
            if error:
                raise SystemExit(error)
            answers.append(answer)
        return answers


def serve(
    pipe: Any,
    store: str,
    rank: int,
    ranks: int,
    make: Callable[..., dict[str, RunStep]],
    arguments: dict[str, Any],
) -> None:
    """Runs laps in a rank process until the parent closes the pipe."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    try:
        import torch
        import torch.distributed as dist

        from megatrain.distributed.device import disable_jit_extensions

        torch.set_num_threads(1)
        disable_jit_extensions()
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks
        )
        contenders = make(rank, ranks, **arguments)
        pipe.send((None, None))
        while True:
            name = pipe.recv()
            dist.barrier()
            pipe.send((contenders[name](), None))
    except EOFError:
        pass
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def race(ranks: Ranks, names: list[str], laps: int) -> dict[str, list[list[Any]]]:
    """Runs the contenders in turns; returns results by name, lap and rank after a warm-up."""
    for name in names:
        ranks.lap(name)
    found: dict[str, list[list[Any]]] = {name: [] for name in names}
    for _ in range(laps):
        for name in names:
            found[name].append(ranks.lap(name))
    return found
