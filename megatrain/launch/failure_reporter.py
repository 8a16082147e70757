"""Reports the failure of a run: the message, the event, the stacks of a rank, the exit."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

from megatrain.config.loader import Config
from megatrain.distributed.env import RankEnv
from megatrain.launch.diagnosis import RankState, find_blocking_ranks
from megatrain.launch.failures import (
    Failure,
    FailureReport,
    Reporter,
    format_failure,
    is_user_error,
    recovery_hint,
    summarize,
)
from megatrain.telemetry.events import EventLog, write_failure
from megatrain.telemetry.rank_log import log_path

_MAX_SHOWN = 8


class ProcessId(NamedTuple):
    """The process of a rank."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


def current_process() -> ProcessId:
    """Returns the host and the id of this process."""
    return ProcessId(socket.gethostname(), os.getpid())


class FailureReporter:
    """Reports failures from one rank.

    Args:
        env: the rank's environment.
        console: the stream that the user reads.
        log: the rank's log.
        report: sends a report to the supervisor, which then reports for the whole run; None
            without a supervisor.
    """

    def __init__(
        self,
        config: Config,
        env: RankEnv,
        *,
        console: TextIO,
        log: TextIO,
        report: Reporter | None,
    ) -> None:
        self.env = env
        self.folder = Path(config.run.output_dir)
        self._config = config
        self._console = console
        self._log = log
        self._report = report
        self._started_at = datetime.now().astimezone()

    @property
    def is_supervised(self) -> bool:
        """True if a supervisor started this rank."""
        return self._report is not None

    def report(self, failure: Failure, *, step: int | None = None) -> str:
        """Reports a failure to the user, once for the whole run; returns the text.

        Args:
            step: the step in which the run failed; 0 before the first.
        """
        text = format_failure(failure, log_path(self._config.run.output_dir, failure.rank))
        if isinstance(failure, FailureReport) and failure.kind == "stall":
            with EventLog(self.folder) as events:
                events.write("stall", step=step, cause=failure.text)
        if self._report is not None:
            assert isinstance(failure, FailureReport)
            self._report(failure)  # the supervisor then ends this process too
            return text
        if hint := recovery_hint(self._config, failure, step=step):
            text = f"{text}\n{hint}"
        print(text, file=self._console, flush=True)
        write_failure(
            self.folder,
            summarize(failure),
            step=step - 1 if step else None,
            since=self._started_at,
            is_user_error=is_user_error(failure),
        )
        return text

    def exit_process(self, text: str) -> NoReturn:
        """Writes `text` to the rank's log and ends this process."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{now} ended by the watchdog:\n{text}", file=self._log, flush=True)
        write_elastic_error_file(text)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)

    def dump_stacks(self, state: RankState) -> None:
        """Writes the Python stacks of all threads into the run's folder."""
        path = stacks_folder(self.folder) / f"rank-{self.env.rank:05d}.txt"
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        rank = f"rank {self.env.rank} of {self.env.world_size} on {current_process()}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                print(f"{now} {rank}\n{state}, for {state.age:.0f} s\n", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"cannot write {path}: {error.strerror}", file=self._log, flush=True)


def claim_reporter(folder: Path, token: str) -> bool:
    """Returns True if this rank is the first one of this start that claims to report the failure.

    The claim is a file in the run's folder, because rank 0 may be gone. A rank that cannot create
    it for another reason than its existence reports too.
    """
    path = _claim_path(folder, token)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def clear_claims(folder: Path) -> None:
    """Deletes the claims of earlier starts."""
    for pattern in (_claim_path(Path(), "*"), Path("logs", ".said-*")):  # the second: older runs
        for path in folder.glob(str(pattern)):
            path.unlink(missing_ok=True)


def _claim_path(folder: Path, token: str) -> Path:
    return folder / "logs" / f".reported-{token}"


def write_elastic_error_file(text: str) -> None:
    """Writes the file from which torchrun takes the reason of a failed process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    message = {
        "message": text,
        "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))},
    }
    try:
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    except OSError:
        return  # torchrun then shows the exit code


def stacks_folder(run_folder: Path) -> Path:
    """Returns the folder of the stack traces."""
    return run_folder / "stack_traces"


def format_stall(
    states: Mapping[int, RankState],
    processes: Mapping[int, ProcessId],
    silent: list[int],
    folder: Path,
    *,
    seconds: float,
) -> str:
    """Returns the report of a stalled run.

    Args:
        states: by rank, of the ranks that answered.
        processes: by rank, of all ranks that connected.
        silent: the ranks that did not answer.
        folder: the run's folder.
        seconds: the time since the last progress of any rank.
    """
    blocking = find_blocking_ranks(states, silent)
    first = f"training is stalled: no rank has made progress for {seconds:.0f} s (run.hang_timeout)"
    if blocking:
        shown = [
            f"rank {rank} ({processes[rank]}), which {_describe(states.get(rank), processes[rank])}"
            if rank in processes
            else f"rank {rank}, which never connected"
            for rank in blocking[:_MAX_SHOWN]
        ]
        first += f"; all ranks are waiting for {'; and for '.join(shown)}{_more(len(blocking))}"
    else:
        first += "; the ranks are waiting for each other in a cycle"
    others = [rank for rank in sorted(states) if rank not in blocking]
    lines = [
        f"  rank {rank}: {states[rank]}, for {states[rank].age:.0f} s"
        for rank in others[:_MAX_SHOWN]
    ]
    if more := _more(len(others)):
        lines.append(f" {more}")
    stacks = f"Python stacks of the ranks: {stacks_folder(folder)}"
    if silent:
        stacks += " (of the ranks that answered)"
    return "\n".join([first, *lines, stacks])


def _describe(state: RankState | None, process: ProcessId) -> str:
    if state is not None:
        return f"has been in {state} for {state.age:.0f} s"
    return f"does not answer: {_condition(process)}"


def _condition(process: ProcessId) -> str:
    """Returns the state of a process according to the kernel, if it runs on this machine."""
    letter = ""
    if process.host == socket.gethostname():
        try:
            letter = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "the process is gone"
    conditions = {
        "T": "the process is stopped (SIGSTOP)",
        "t": "the process is stopped by a debugger",
        "D": "the process waits for a disk or a file system",
        "Z": "the process is gone",
    }
    return conditions.get(letter, "the process or its machine is frozen")


def _more(count: int) -> str:
    return f" and {count - _MAX_SHOWN} more" if count > _MAX_SHOWN else ""
