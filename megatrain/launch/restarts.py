"""Whether a run whose ranks failed is started again on this machine, and from where (run.max_restarts).

The supervisor's own loop, where torch's elastic agent would be another supervisor within it: ranks are forked from a process
that has imported everything, and what the user reads stays the first cause and nothing else.
"""

from __future__ import annotations

import dataclasses
import sys
from datetime import datetime
from pathlib import Path

from megatrain.checkpoint import manifest, retention
from megatrain.config.loader import Config
from megatrain.launch.failures import FailureReport, RankExit, format_sentence
from megatrain.launch.recovery_hint import recovery_hint
from megatrain.launch.supervisor import RunOutcome
from megatrain.telemetry.events import EventLog, Name, write_failure


class RestartPolicy:
    """Counts them, from before the first start on."""

    def __init__(self, config: Config) -> None:
        self._config, self._folder = config, Path(config.run.output_dir)
        self._count, self._began = 0, datetime.now().astimezone()
        self._failed_steps: set[int] = set()
        self._before = self._checkpoints() if config.run.max_restarts else set()

    def again_after(self, ended: RunOutcome) -> bool:
        """Whether to start the ranks again; says so, or why not and what the user can do."""
        assert ended.failure is not None
        again = self._decide(ended, ended.failure)
        if not again and (words := recovery_hint(self._config, ended.failure, step=ended.step)):
            print(words, file=sys.stderr, flush=True)
        return again

    def _decide(self, ended: RunOutcome, failure: FailureReport | RankExit) -> bool:
        most = self._config.run.max_restarts
        of_user = isinstance(failure, FailureReport) and failure.kind == "user"
        if not most or of_user:
            write_failure(
                self._folder,
                format_sentence(failure),
                step=_last_done(ended),
                since=self._began,
                of_user=of_user,
            )
            return False
        where = f"step {ended.step}" if ended.step else "the start"
        why_not = (
            f"{where} failed twice"
            if ended.step in self._failed_steps
            else ""
            if self._count < most
            else f"it was restarted {most} times"
        )
        if why_not:
            self._write("fail", ended, reason=why_not)
            print(
                f"not restarted: {why_not} (run.max_restarts={most})", file=sys.stderr, flush=True
            )
            return False
        self._failed_steps.add(ended.step)
        self._count, self._began = self._count + 1, datetime.now().astimezone()
        self._write("restart", ended, restart=self._count, of=most)
        print(
            f"restart {self._count} of {most} (run.max_restarts) after a failure in {where}",
            file=sys.stderr,
            flush=True,
        )
        return True

    def config(self) -> Config:
        """Of the next start: it goes on from the newest whole checkpoint that the run has made; without one, from where it began."""
        if self._config.checkpoint.resume == "auto":
            return self._config
        made = [
            path
            for path, *_ in sorted(self._checkpoints() - self._before, reverse=True)
            if manifest.find_problem(path) is None
        ]
        if not made:
            return self._config
        return dataclasses.replace(
            self._config,
            checkpoint=dataclasses.replace(self._config.checkpoint, resume=str(made[0])),
        )

    def _checkpoints(self) -> set[tuple[Path, int, int]]:
        """Those of the run's folder, each with numbers that another of the same name does not have."""
        folders = [
            (path, path.stat()) for path in retention.list_checkpoints(self._folder / "checkpoints")
        ]
        return {(path, about.st_ino, about.st_mtime_ns) for path, about in folders}

    def _write(self, event: Name, ended: RunOutcome, **fields: object) -> None:
        assert ended.failure is not None
        with EventLog(self._folder) as events:
            events.write(
                event, step=_last_done(ended), cause=format_sentence(ended.failure), **fields
            )


def _last_done(ended: RunOutcome) -> int | None:
    return ended.step - 1 if ended.step else None
