"""Start the ranks of a run on this machine and watch over them.

On CPUs the ranks are forked from a parent that has imported torch, deepspeed and transformers once: the imports cost
more CPU time than many a small run. CUDA does not survive a fork, so on GPUs they are spawned.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from typing import Any

from megatrain.config.loader import Config
from megatrain.distributed import device
from megatrain.distributed.activity import RankActivity
from megatrain.distributed.env import RankEnv
from megatrain.errors import ConfigError, UserError
from megatrain.launch.rendezvous import GROUP_TIMEOUT
from megatrain.launch.restarts import RestartPolicy
from megatrain.launch.supervisor import STOP_SIGNALS, RankProcess, RunOutcome, Supervisor
from megatrain.launch.worker import Target, start_rank

_HERE = "127.0.0.1"


def run_local(target: Target, config: Config, *, world_size: int) -> int:
    """Run `target(config, place, activity)` on `world_size` ranks of this machine; returns the run's exit code.

    `target` must be a function of a module, as spawned ranks import it. It finds torch.distributed set up. When a rank
    fails the first cause is printed, the others are ended, and they are all started again as often as run.max_restarts says;
    else the code is not 0.
    """
    _refuse_a_crowd(world_size)
    with _environment(world_size):
        context, restarts = _context(world_size), RestartPolicy(config)
        while True:
            ended = _attempt(context, target, config, world_size)
            if ended.failure is None or not restarts.again_after(ended):
                return ended.code
            config = restarts.config()


def _refuse_a_crowd(world_size: int) -> None:
    """So many processes that the machine would only swap: a layout for a cluster, or a slip of the keys."""
    most = max(64, 16 * device.cpu_cores())
    if world_size > most and not device.has_gpu():  # those are counted
        raise UserError(
            f"the layout asks for {world_size} ranks, and without a launcher all would start on this machine's {device.cpu_cores()} cores, "
            f"which are good for {most} at most: choose a smaller layout, or start the run on several machines with torchrun or srun"
        )


def _attempt(
    context: ForkContext | SpawnContext, target: Target, config: Config, world_size: int
) -> RunOutcome:
    with _listening(config.run.master_port) as listener:
        supervisor = Supervisor(config)
        with supervisor.passing_signals_on():
            for rank in range(world_size):
                place = RankEnv(
                    rank, world_size, rank, world_size, _HERE, listener.getsockname()[1]
                )
                supervisor.ranks.append(_start(context, target, config, place))
            # Served from here, after the last fork: a rank that dies takes no store with it.
            with _store(listener):
                return supervisor.watch()


@contextlib.contextmanager
def _environment(world_size: int) -> Iterator[None]:
    before = dict(os.environ)
    device.set_environment(world_size)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """The socket of the store, open before any rank starts: no other run can take its port in between."""
    try:
        listener = socket.create_server((_HERE, port))
    except OSError as error:
        rule = f"cannot be used ({error.strerror})"
        raise ConfigError("run.master_port", port, rule, "0 takes a free port") from None
    with listener:
        yield listener


@contextlib.contextmanager
def _store(listener: socket.socket) -> Iterator[None]:
    from torch.distributed import TCPStore

    address, port = listener.getsockname()
    store = TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=GROUP_TIMEOUT,
        master_listen_fd=listener.detach(),
    )
    yield
    del store


def _context(world_size: int) -> ForkContext | SpawnContext:
    if not device.has_gpu():
        import_before_fork()
        return multiprocessing.get_context("fork")
    import torch

    gpus = torch.cuda.device_count()
    if gpus < world_size:
        raise UserError(
            f"the layout asks for {world_size} ranks and this machine shows {gpus} GPUs: choose a smaller layout, "
            "start the run on several machines with torchrun or srun, or set DS_ACCELERATOR=cpu to train on CPUs"
        )
    return multiprocessing.get_context("spawn")


# What deepspeed.initialize and a first optimizer step import on their own, at up to 4 s of CPU time in each rank.
_IMPORTED_LATE = (
    "accelerate",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # brings torch's compiler, half a second of each rank's start
    "functorch.compile",
    "torch._dynamo",
    "transformers.modeling_utils",
    "transformers.models.auto.configuration_auto",
    "transformers.tokenization_utils_base",
)


def import_before_fork() -> None:
    """Import what every rank needs, in the parent that they are forked from."""
    device.disable_jit_extensions()
    for name in _IMPORTED_LATE:
        # Inner modules of libraries: where another version has none of that name, each rank imports what it needs.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # DeepSpeed collects garbage a dozen times as it starts: a rank need not look through all that libraries have made.
    gc.freeze()


def _start(
    context: ForkContext | SpawnContext, target: Target, config: Config, place: RankEnv
) -> RankProcess:
    reader, writer = context.Pipe(duplex=False)
    step = context.RawValue("q", 0)
    process = context.Process(
        target=_rank_main,
        args=(target, config, place, writer, step, os.getpid()),
        name=f"megatrain rank {place.rank}",
    )
    # Held back until the rank has its own handlers: it would run its copy of the parent's otherwise.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    writer.close()
    return RankProcess(place.rank, process, reader, step)


def _rank_main(
    target: Target, config: Config, place: RankEnv, writer: Connection, step: Any, parent: int
) -> None:
    # A process group of its own: Ctrl-C in a terminal reaches the supervisor alone, and from there each rank once.
    os.setpgid(0, 0)
    _die_with(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    sys.exit(start_rank(target, config, place, report=writer.send, activity=RankActivity(step)))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that happens (Linux only)."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
