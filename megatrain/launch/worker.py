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

from megatrain.config.loader import Config
from megatrain.distributed import device as device_module
from megatrain.distributed.activity import RankActivity, WorldGroup
from megatrain.distributed.env import RankEnv
from megatrain.errors import UserError
from megatrain.launch.failure_reporter import FailureReporter, write_elastic_error_file
from megatrain.launch.failures import Reporter, describe_error
from megatrain.launch.rendezvous import GROUP_TIMEOUT, ReportedByRank0, rendezvous, timeout_of
from megatrain.launch.watchdog import start_watchdog
from megatrain.launch.watchdog_thread import WatchdogThread
from megatrain.telemetry import rank_log

if TYPE_CHECKING:
    from torch.distributed import Store

Target = Callable[[Config, RankEnv, RankActivity], object]

INTERRUPTED = 130


def start_rank(
    target: Target,
    config: Config,
    place: RankEnv,
    *,
    report: Reporter | None = None,
    activity: RankActivity | None = None,
) -> int:
    """Run `target(config, place, activity)` as the rank at `place`, inside its torch.distributed group; returns the exit code 0.

    `report` takes a failure to the supervisor that started this rank and holds its store; without it rank 0's watchdog says
    why the run failed. After a failure the process ends here and nothing is returned.
    """
    try:
        with rank_log.rank_streams(config, place) as streams:
            return _work(target, config, place, streams, report, activity or RankActivity())
    except UserError as error:  # there is no log, everything later is caught within
        _fail(error, place, sys.stderr, report, watchdog=None)


def _work(
    target: Target,
    config: Config,
    place: RankEnv,
    streams: rank_log.LogStreams,
    report: Reporter | None,
    activity: RankActivity,
) -> int:
    watchdog: WatchdogThread | None = None
    try:
        device_module.set_rank_environment(place)
        device_module.disable_jit_extensions()
        store = rendezvous(
            place, supervised=report is not None, patience=timeout_of(config.run.hang_timeout)
        )
        voice = FailureReporter(config, place, console=streams.err, log=streams.log, report=report)
        watchdog = start_watchdog(activity, voice, store, hang_timeout=config.run.hang_timeout)
        with activity.collective("joining the", WorldGroup(range(place.world_size))):
            _join_group(place, store)
        target(config, place, activity)
        _leave_group()
        watchdog.close()
        return 0
    except KeyboardInterrupt:
        traceback.print_exc(file=streams.log)
        if watchdog is not None:
            watchdog.close()
        _leave(INTERRUPTED)
    except ReportedByRank0 as error:
        print(f"error: {error}", file=streams.log, flush=True)
        _leave(1)
    except Exception as error:
        traceback.print_exc(file=streams.log)
        streams.lines.write("ERROR", traceback.format_exc())
        _fail(error, place, streams.err, report, watchdog)


def _join_group(place: RankEnv, store: Store) -> None:
    import torch
    import torch.distributed as dist

    device = device_module.select_device(place)
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
    place: RankEnv,
    console: TextIO,
    report: Reporter | None,
    watchdog: WatchdogThread | None,
) -> NoReturn:
    """Tell the supervisor, or the watchdogs, or else the user, and leave. File descriptors still lead to the log: what libraries
    say as connections break stays there."""
    failure = describe_error(error, place.rank)
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
    write_elastic_error_file(failure.text)
    _leave(1)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()
    os._exit(code)
