"""Starts and supervises the ranks of a run on this machine.

On CPUs the ranks are forked from a process that has imported torch, deepspeed and transformers
once: these imports take more CPU time than many small runs. CUDA does not survive a fork, so on
GPUs the ranks are spawned.
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
from megatrain.distributed.process_group import GROUP_TIMEOUT
from megatrain.errors import ConfigError, UserError
from megatrain.launch.supervisor import (
    STOP_SIGNALS,
    RankProcess,
    RestartPolicy,
    RunOutcome,
    Supervisor,
)
from megatrain.launch.worker import RankFunction, start_rank

_LOOPBACK = "127.0.0.1"


def run_local(function: RankFunction, config: Config, *, world_size: int) -> int:
    """Runs `function(config, env, activity)` on `world_size` ranks; returns the exit code.

    torch.distributed is initialised when `function` starts. If a rank fails, the cause is printed
    and the other ranks are ended. Then all are started again, up to run.max_restarts times.

    Args:
        function: a function of a module; spawned ranks import it.

    Raises:
        UserError: this machine has too few GPUs or CPU cores.
    """
    _check_world_size(world_size)
    with _environment(world_size):
        context = _start_context(world_size)
        restarts = RestartPolicy(config)
        while True:
            outcome = _run_once(context, function, config, world_size)
            if outcome.failure is None or not restarts.should_restart(outcome):
                return outcome.code
            config = restarts.config()


def _check_world_size(world_size: int) -> None:
    """Raises UserError for more ranks than the cores can run without swapping."""
    cores = device.cpu_cores()
    limit = max(64, 16 * cores)
    if world_size > limit and not device.has_gpu():  # GPUs are counted
        raise UserError(
            f"the layout requires {world_size} ranks, but without a launcher all of them start on "
            f"this machine's {cores} cores, which support at most {limit}; choose a smaller "
            "layout, or start the run on several machines with torchrun or srun"
        )


def _run_once(
    context: ForkContext | SpawnContext, function: RankFunction, config: Config, world_size: int
) -> RunOutcome:
    with _listening(config.run.master_port) as listener:
        port = listener.getsockname()[1]
        supervisor = Supervisor(config)
        with supervisor.forwarding_signals():
            for rank in range(world_size):
                env = RankEnv(rank, world_size, rank, world_size, _LOOPBACK, port)
                supervisor.ranks.append(_start(context, function, config, env))
            # Hosted by this process, after the last fork: it outlives ranks that die.
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
    """Opens the store's socket before any rank starts, so that no other run can take the port."""
    try:
        listener = socket.create_server((_LOOPBACK, port))
    except OSError as error:
        requirement = f"must be a free port ({error.strerror})"
        raise ConfigError(
            "run.master_port",
            port,
            requirement,
            "0 picks a free port",
            fix={"run.master_port": 0},
        ) from None
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


def _start_context(world_size: int) -> ForkContext | SpawnContext:
    if not device.has_gpu():
        import_before_fork()
        return multiprocessing.get_context("fork")
    import torch

    gpus = torch.cuda.device_count()
    if gpus < world_size:
        raise UserError(
            f"the layout requires {world_size} ranks, but this machine has {gpus} GPUs; choose a "
            "smaller layout, start the run on several machines with torchrun or srun, or set "
            "DS_ACCELERATOR=cpu to train on CPUs"
        )
    return multiprocessing.get_context("spawn")


_IMPORTED_LATE = (
    "accelerate",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch's compiler: half a second a rank
    "functorch.compile",
    "torch._dynamo",
    "transformers.modeling_utils",
    "transformers.models.auto.configuration_auto",
    "transformers.tokenization_utils_base",
)
"""Modules that deepspeed.initialize and the first optimizer step import, in up to 4 s a rank."""


def import_before_fork() -> None:
    """Imports the modules that every rank needs into the process that ranks are forked from."""
    device.disable_jit_extensions()
    for name in _IMPORTED_LATE:
        # Other versions of the libraries may lack an inner module; each rank then imports its own.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # DeepSpeed collects garbage a dozen times as it starts; frozen objects are not scanned.
    gc.freeze()


def _start(
    context: ForkContext | SpawnContext, function: RankFunction, config: Config, env: RankEnv
) -> RankProcess:
    reader, writer = context.Pipe(duplex=False)
    step = context.RawValue("q", 0)
    process = context.Process(
        target=_rank_main,
        args=(function, config, env, writer, step, os.getpid()),
        name=f"megatrain rank {env.rank}",
    )
    # Blocked until the rank has its own handlers: it would run its copy of the parent's.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    writer.close()
    return RankProcess(env.rank, process, reader, step)


def _rank_main(
    function: RankFunction,
    config: Config,
    env: RankEnv,
    writer: Connection,
    step: Any,
    parent: int,
) -> None:
    # A process group of its own: Ctrl-C reaches only the supervisor, which forwards it once.
    os.setpgid(0, 0)
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    sys.exit(start_rank(function, config, env, report=writer.send, activity=RankActivity(step)))


def die_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when process `parent` ends (Linux only)."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)
