"""One rank from its start to its end: its log, its watchdog, its group, the work, and how it says that it failed.

A rank that fails says why and leaves at once, without cleaning up: a neighbour that is gone could hold up any step of
a clean exit. It says so to the supervisor that started it, or else to rank 0's watchdog, which speaks for all.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TextIO

from megatrain import log, machine
from megatrain.beat import Beat, Everyone
from megatrain.config import Config
from megatrain.errors import UserError
from megatrain.launch.failure import Reporter, describe
from megatrain.launch.meeting import GROUP_TIMEOUT, SaidByRank0, meet, patience_of
from megatrain.place import Place
from megatrain.watchdog.start import start_watchdog
from megatrain.watchdog.thread import WatchdogThread
from megatrain.watchdog.voice import Voice, leave_word

if TYPE_CHECKING:
    from torch.distributed import Store

Target = Callable[[Config, Place, Beat], object]

INTERRUPTED = 130


def enter_rank(
    target: Target,
    config: Config,
    place: Place,
    *,
    report: Reporter | None = None,
    beat: Beat | None = None,
) -> int:
    """Run `target(config, place, beat)` as the rank at `place`, inside its torch.distributed group; returns the exit code 0.

    `report` takes a failure to the supervisor that started this rank and holds its store; without it rank 0's watchdog says
    why the run failed. After a failure the process ends here and nothing is returned.
    """
    try:
        with log.rank_streams(config, place) as streams:
            return _work(target, config, place, streams, report, beat or Beat())
    except UserError as error:  # there is no log, everything later is caught within
        _fail(error, place, sys.stderr, report, watchdog=None)


def _work(
    target: Target,
    config: Config,
    place: Place,
    streams: log.Streams,
    report: Reporter | None,
    beat: Beat,
) -> int:
    watchdog: WatchdogThread | None = None
    try:
        machine.set_rank_environment(place)
        machine.forbid_builds()
        store = meet(
            place, supervised=report is not None, patience=patience_of(config.run.stall_seconds)
        )
        voice = Voice(config, place, console=streams.err, log=streams.log, report=report)
        watchdog = start_watchdog(beat, voice, store, stall_seconds=config.run.stall_seconds)
        with beat.within("joining the", Everyone(range(place.world_size))):
            _join_group(place, store)
        target(config, place, beat)
        _leave_group()
        watchdog.close()
        return 0
    except KeyboardInterrupt:
        traceback.print_exc(file=streams.log)
        if watchdog is not None:
            watchdog.close()
        _leave(INTERRUPTED)
    except SaidByRank0 as error:
        print(f"error: {error}", file=streams.log, flush=True)
        _leave(1)
    except Exception as error:
        traceback.print_exc(file=streams.log)
        streams.lines.write("ERROR", traceback.format_exc())
        _fail(error, place, streams.err, report, watchdog)


def _join_group(place: Place, store: Store) -> None:
    import torch
    import torch.distributed as dist

    device = machine.device_of(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=GROUP_TIMEOUT,
    )


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _fail(
    error: Exception,
    place: Place,
    console: TextIO,
    report: Reporter | None,
    watchdog: WatchdogThread | None,
) -> NoReturn:
    """Tell the supervisor, or the watchdogs, or else the user, and leave. File descriptors still lead to the log: what libraries
    say as connections break stays there."""
    failure = describe(error, place.rank)
    if report is not None:
        report(failure)
        _leave(1)
    if watchdog is not None:
        watchdog.tell(failure)  # and if there is nobody to say it:
    print(
        f"error: {failure.text}"
        if failure.kind == "user"
        else f"rank {failure.rank} failed:\n{failure.text}",
        file=console,
        flush=True,
    )
    leave_word(failure.text)
    _leave(1)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()
    os._exit(code)
