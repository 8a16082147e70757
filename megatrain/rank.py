"""One rank from its start to its end: its log, its group, the work, and how it says that it failed.

A rank that fails says why and leaves at once, without cleaning up: a neighbour that is gone could hold up any step of
a clean exit.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TextIO

from megatrain import log, machine
from megatrain.config import Config
from megatrain.errors import UserError
from megatrain.place import Place

if TYPE_CHECKING:
    from torch.distributed import Store

Target = Callable[[Config, Place], object]

# The first step of a large run, a slow file system or a long evaluation on one rank must not look like a hang.
GROUP_TIMEOUT = timedelta(minutes=30)

INTERRUPTED = 130

# How long rank 0, which may hold the store, stays at most for the others to ask it whether a sentence has been said.
_SECONDS_TO_ASK = 5.0


class Report(NamedTuple):
    """What a failing rank tells its supervisor.

    `user` is a sentence for the user, `error` a traceback, `lost` the traceback of a connection that broke because
    another rank failed first.
    """

    rank: int
    kind: Literal["user", "error", "lost"]
    text: str
    time: float


Reporter = Callable[[Report], Any]


def enter_rank(target: Target, config: Config, place: Place, *, report: Reporter | None = None) -> int:
    """Run `target(config, place)` as the rank at `place`, inside its torch.distributed group; returns the exit code 0.

    `report` takes a failure to the supervisor that started this rank and holds its store; without it the rank prints
    the failure itself. After a failure the process ends here and nothing is returned.
    """
    try:
        with log.rank_streams(config, place) as streams:
            return _work(target, config, place, streams, report)
    except UserError as error:  # there is no log, everything later is caught within
        _fail(error, place, sys.stderr, report, store=None)


def _work(target: Target, config: Config, place: Place, streams: log.Streams, report: Reporter | None) -> int:
    store: Store | None = None
    try:
        machine.set_rank_environment(place)
        machine.forbid_builds()
        store = _meet(place, supervised=report is not None)
        _join_group(place, store)
        target(config, place)
        _leave_group()
        return 0
    except KeyboardInterrupt:
        traceback.print_exc(file=streams.log)
        _leave(INTERRUPTED)
    except Exception as error:
        traceback.print_exc(file=streams.log)
        streams.lines.write("ERROR", traceback.format_exc())
        _fail(error, place, streams.err, report, store)


def _meet(place: Place, *, supervised: bool) -> Store:
    """The store through which ranks find each other; a supervisor holds it, otherwise the launcher or rank 0 does."""
    import torch.distributed as dist

    if supervised:
        return dist.TCPStore(place.master_addr, place.master_port, is_master=False, timeout=GROUP_TIMEOUT)
    store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=GROUP_TIMEOUT))
    return store


def _join_group(place: Place, store: Store) -> None:
    import torch
    import torch.distributed as dist

    device = machine.device_of(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store, rank=place.rank, world_size=place.world_size, timeout=GROUP_TIMEOUT,
    )  # fmt: skip


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _describe(error: Exception, rank: int) -> Report:
    if isinstance(error, UserError):
        return Report(rank, "user", str(error), time.time())
    text = "".join(traceback.format_exception(error))
    return Report(rank, "lost" if _is_lost_connection(error) else "error", text, time.time())


# What gloo, NCCL and the store say when the rank at the other end is gone.
_LOST = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket timeout",
         "remote process exited", "failed to recv, got 0 bytes")  # fmt: skip


def _is_lost_connection(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(words in str(error).lower() for words in _LOST)


def _fail(error: Exception, place: Place, console: TextIO, report: Reporter | None, store: Store | None) -> NoReturn:
    """Tell the supervisor, or else the user, and leave. File descriptors still lead to the log: what libraries say as
    connections break stays there."""
    failure = _describe(error, place.rank)
    if report is not None:
        report(failure)
    elif failure.kind != "user":
        print(f"rank {failure.rank} failed:\n{failure.text}", file=console, flush=True)
    else:
        if _is_first_to_say(failure, store):
            print(f"error: {failure.text}", file=console, flush=True)
        if store is not None and place.rank == 0:
            _wait_for_askers(failure, store, place.world_size)
    _leave(1)


def _is_first_to_say(failure: Report, store: Store | None) -> bool:
    """Whether this rank is to print a sentence that others may have to say as well."""
    if store is None:
        return True
    try:
        return store.add(_said(failure), 1) == 1
    except RuntimeError:  # the rank that held the store is gone, and it has said something
        return False


def _wait_for_askers(failure: Report, store: Store, world_size: int) -> None:
    """Until all ranks have had the same to say, or it seems that the others have not."""
    until = time.monotonic() + _SECONDS_TO_ASK
    with contextlib.suppress(RuntimeError):
        while store.add(_said(failure), 0) < world_size and time.monotonic() < until:
            time.sleep(0.05)


def _said(failure: Report) -> str:
    return f"megatrain/said/{failure.text}"


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
