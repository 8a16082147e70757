"""One rank from start to exit: log, watchdog, process group, work, and the report of a failure.

A rank that fails reports the failure and exits at once, without cleaning up: any step of a clean
exit may block on a neighbour that is gone. The report goes to the supervisor that started the rank,
or to rank 0's watchdog, which reports for all ranks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

from megatrain.config.loader import Config
from megatrain.distributed import device as device_module
from megatrain.distributed.activity import RankActivity, WorldGroup
from megatrain.distributed.env import RankEnv
from megatrain.distributed.process_group import init_process_group
from megatrain.errors import UserError
from megatrain.launch.failure_reporter import FailureReporter, write_elastic_error_file
from megatrain.launch.failures import Reporter, report_of
from megatrain.launch.rendezvous import (
    ReportedByRank0,
    rendezvous,
    rendezvous_timeout,
)
from megatrain.launch.watchdog import start_watchdog
from megatrain.launch.watchdog_thread import WatchdogThread
from megatrain.telemetry import rank_log

RankFunction = Callable[[Config, RankEnv, RankActivity], object]
"""The work of a rank."""

INTERRUPTED = 130
"""The exit status of a process that SIGINT ended."""


def start_rank(
    function: RankFunction,
    config: Config,
    env: RankEnv,
    *,
    report: Reporter | None = None,
    activity: RankActivity | None = None,
) -> int:
    """Runs `function(config, env, activity)` inside the torch.distributed group; returns 0.

    After a failure the process exits here and the function does not return.

    Args:
        report: sends a failure to the supervisor that started this rank and that hosts the store;
            None under a launcher.
    """
    try:
        with rank_log.rank_streams(
            config.run.output_dir, env, verbose=config.run.verbose
        ) as streams:
            return _run(function, config, env, streams, report, activity or RankActivity())
    except UserError as error:  # the log cannot be opened; later errors are handled in _run
        _fail(error, env, sys.stderr, report, watchdog=None)


def _run(
    function: RankFunction,
    config: Config,
    env: RankEnv,
    streams: rank_log.LogStreams,
    report: Reporter | None,
    activity: RankActivity,
) -> int:
    watchdog: WatchdogThread | None = None
    hang_timeout = config.run.hang_timeout
    try:
        device_module.set_rank_environment(env)
        device_module.disable_jit_extensions()
        timeout = rendezvous_timeout(hang_timeout)
        store = rendezvous(env, supervised=report is not None, timeout=timeout)
        reporter = FailureReporter(config, env, console=streams.err, log=streams.log, report=report)
        watchdog = start_watchdog(activity, reporter, store, hang_timeout=hang_timeout)
        with activity.collective("joining the", WorldGroup(range(env.world_size))):
            init_process_group(env, store)
        function(config, env, activity)
        _destroy_process_group()
        watchdog.close()
        return 0
    except KeyboardInterrupt:
        traceback.print_exc(file=streams.log)
        if watchdog is not None:
            watchdog.close()
        _exit_process(INTERRUPTED)
    except ReportedByRank0 as error:
        print(f"error: {error}", file=streams.log, flush=True)
        _exit_process(1)
    except Exception as error:
        traceback.print_exc(file=streams.log)
        streams.lines.write("ERROR", traceback.format_exc())
        _fail(error, env, streams.err, report, watchdog)


def _destroy_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _fail(
    error: Exception,
    env: RankEnv,
    console: TextIO,
    report: Reporter | None,
    watchdog: WatchdogThread | None,
) -> NoReturn:
    """Reports the failure to the supervisor, the watchdogs or the user, and exits.

    File descriptors 1 and 2 stay redirected to the log, for messages of libraries as connections
    break.
    """
    failure = report_of(error, env.rank)
    if report is not None:
        report(failure)
        _exit_process(1)
    if watchdog is not None:
        watchdog.report_failure(failure)  # returns if no watchdog reports it
    is_user = failure.kind == "user"
    text = f"error: {failure.text}" if is_user else f"rank {failure.rank} failed:\n{failure.text}"
    print(text, file=console, flush=True)
    write_elastic_error_file(failure.text)
    _exit_process(1)


def _exit_process(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()
    os._exit(code)
