"""How a watchdog speaks and leaves: the one message, the event, the stacks of a rank, and the end of its process."""

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
from megatrain.launch.diagnosis import ProcessState, find_blocking_rank
from megatrain.launch.failures import (
    FailureReport,
    RankExit,
    Reporter,
    format_failure,
    format_sentence,
)
from megatrain.launch.recovery_hint import recovery_hint
from megatrain.telemetry.events import EventLog, write_failure
from megatrain.telemetry.rank_log import log_path

_MOST_SHOWN = 8


class ProcessId(NamedTuple):
    """A rank's process."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


def current_process() -> ProcessId:
    return ProcessId(socket.gethostname(), os.getpid())


class FailureReporter:
    """One rank's. With a `report` a supervisor speaks for the run, and what is said goes to it."""

    def __init__(
        self,
        config: Config,
        place: RankEnv,
        *,
        console: TextIO,
        log: TextIO,
        report: Reporter | None,
    ) -> None:
        self.place, self.folder = place, Path(config.run.output_dir)
        self._config, self._console, self._log, self._report = config, console, log, report
        self._began = datetime.now().astimezone()

    @property
    def is_supervised(self) -> bool:
        return self._report is not None

    def say(self, failure: FailureReport | RankExit, *, step: int | None = None) -> str:
        """Tell the user, once for the whole run; returns what was told. `step` is the one being done, 0 before the first."""
        text = format_failure(failure, log_path(self._config, failure.rank))
        if isinstance(failure, FailureReport) and failure.kind == "stall":
            with EventLog(self.folder) as events:
                events.write("stall", step=step, cause=failure.text)
        if self._report is not None:
            assert isinstance(failure, FailureReport)
            self._report(failure)  # which ends this process too
        else:
            print(text, file=self._console, flush=True)
            if words_on := recovery_hint(self._config, failure, step=step):
                print(words_on, file=self._console, flush=True)
                text = f"{text}\n{words_on}"
            of_user = isinstance(failure, FailureReport) and failure.kind == "user"
            write_failure(
                self.folder,
                format_sentence(failure),
                step=step - 1 if step else None,
                since=self._began,
                of_user=of_user,
            )
        return text

    def leave(self, text: str) -> NoReturn:
        """End this process, wherever its main thread is."""
        print(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} ended by the watchdog:\n{text}",
            file=self._log,
            flush=True,
        )
        write_elastic_error_file(text)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)

    def dump(self, state: ProcessState) -> None:
        """All Python stacks of this process, in the run's folder."""
        path = stacks_folder(self.folder) / f"rank-{self.place.rank:05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                now = time.strftime("%Y-%m-%d %H:%M:%S %z")
                print(
                    f"{now} rank {self.place.rank} of {self.place.world_size} on {current_process()}\n{_in_step(state)}, for "
                    f"{state.age:.0f} s\n",
                    file=file,
                    flush=True,
                )
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"{path} cannot be written: {error.strerror}", file=self._log, flush=True)


def claim_reporter(folder: Path, token: str) -> bool:
    """Whether this rank is the first of its start of the run to say why it ends. Rank 0 may be gone, so the run's folder decides: a file is
    made there once, whoever asks. Ranks that cannot make it, for whatever reason but that it is there, all speak."""
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        os.close(os.open(_claim(folder, token), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def clear_claims(folder: Path) -> None:
    """Of starts before, whose ranks are gone."""
    for path in folder.glob(str(_claim(Path(), "*"))):
        path.unlink(missing_ok=True)


def _claim(folder: Path, token: str) -> Path:
    return folder / "logs" / f".said-{token}"


def write_elastic_error_file(text: str) -> None:
    """Where torchrun looks for why a process failed: it shows that at the end of its own report."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    about = {
        "message": text,
        "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))},
    }
    try:
        Path(path).write_text(json.dumps({"message": about}), encoding="utf-8")
    except OSError:
        return  # torchrun shows the exit code then


def stacks_folder(run_folder: Path) -> Path:
    return run_folder / "stacks"


def format_stall(
    states: Mapping[int, ProcessState],
    who: Mapping[int, ProcessId],
    silent: list[int],
    folder: Path,
    *,
    seconds: float,
) -> str:
    """What is said of a run in which nothing has moved for so many seconds."""
    awaited = find_blocking_rank(states, silent)
    lines = [f"the run stands still: nothing has moved for {seconds:.0f} s (run.hang_timeout)"]
    if awaited:
        shown = [
            f"rank {rank} ({who[rank]}), which {_of(states.get(rank), who[rank])}"
            if rank in who
            else f"rank {rank}, which never came"
            for rank in awaited[:_MOST_SHOWN]
        ]
        lines[0] += f", and everyone waits for {'; and for '.join(shown)}{_more(len(awaited))}"
    else:
        lines[0] += ", and the ranks wait for each other in a circle"
    others = [rank for rank in sorted(states) if rank not in awaited]
    lines += [
        f"  rank {rank}: {_in_step(states[rank])}, for {states[rank].age:.0f} s"
        for rank in others[:_MOST_SHOWN]
    ]
    if more := _more(len(others)):
        lines.append(f" {more}")
    lines.append(
        f"the ranks' Python stacks are in {stacks_folder(folder)}"
        + (", but for who does not answer" if silent else "")
    )
    return "\n".join(lines)


def _of(state: ProcessState | None, who: ProcessId) -> str:
    if state is not None:
        return f"has been in {_in_step(state)} for {state.age:.0f} s"
    return f"does not answer: {_condition(who)}"


def _condition(who: ProcessId) -> str:
    """What the kernel says of a process, where it is of this machine."""
    letter = ""
    if who.host == socket.gethostname():
        try:
            letter = Path(f"/proc/{who.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "it is gone"
    known = {
        "T": "it is stopped (SIGSTOP)",
        "t": "it is stopped by a debugger",
        "D": "it waits for a disk or a file system",
        "Z": "it is gone",
    }
    return known.get(letter, "it is frozen, or its machine is")


def _in_step(state: ProcessState) -> str:
    return f"step {state.step}, {state.words}" if state.step else state.words


def _more(count: int) -> str:
    return f" and {count - _MOST_SHOWN} more" if count > _MOST_SHOWN else ""
