"""kill -9 of any rank at any moment: no complete checkpoint is lost, and the run ends unchanged.

A trial chooses a phase and a rank, and kills the rank a random time after it entered the phase. The
marks of the dead rank (helpers/fault_marks.py) show the phase that was hit. Trials continue until
each phase was hit often enough.
"""

from __future__ import annotations

import os
import random
import re
import signal
import statistics
import time
from collections import Counter
from typing import NamedTuple

import pytest
from helpers.fault_marks import PHASES, State
from helpers.slurm_jobs import (
    ENDED,
    TIMEOUT,
    Job,
    assert_same,
    complete_steps,
    last_step,
    metrics,
    rank_processes,
    write_run,
)

pytestmark = pytest.mark.chaos
STEPS, KEEP = 120, 3
LAYOUTS = {
    "pipeline2-data2": ({"pipeline": 2, "data": 2}, {}),
    "tensor2-pipeline2-bf16": ({"tensor": 2, "pipeline": 2}, {"dtype": "bf16"}),
    "data4-zero3": ({"data": 4, "zero": 3}, {}),
}
MAX_PAUSE = {"loading": 0.15, "stepping": 0.1, "evaluating": 0.1, "saving": 0.5}
"""Maximum seconds in a phase before the kill: about the duration of the phase."""
MAX_ENTRY = {"loading": 1, "stepping": 15, "evaluating": 3, "saving": 3}
"""The kill is in one of the job's first entries into a phase, up to this number."""


class Hit(NamedTuple):
    phase: str
    rank: int
    seconds: float
    """From the kill to the end of the job."""
    is_named: bool
    """True if the job's log names the rank, apart from Slurm's message."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kill_in_each_phase(layout, cluster, warm, tmp_path):
    parallel, train = LAYOUTS[layout]
    trials = Trials(cluster, warm, tmp_path, seed=layout, parallel=parallel, train=train)
    while missing := trials.missing(2):
        assert len(trials.hits) < 20, f"phases that 20 kills did not hit often enough: {missing}"
        trials.run_trial(trials.in_phase)
    trials.finish()


def test_kill_at_any_moment(cluster, warm, tmp_path):
    trials = Trials(cluster, warm, tmp_path, seed="any moment")
    while len(trials.hits) < 4:
        trials.run_trial(trials.some_time)
    trials.finish()


class Trials:
    """Jobs of a run that are killed until the run is complete; then jobs of another run.

    Each complete run is compared with an undisturbed one.
    """

    def __init__(self, cluster, python, folder, *, seed, parallel=None, train=None) -> None:
        self.folder, self.hits, self.recovery_seconds = folder, [], []
        self._random, self._runs, self._killed_at = random.Random(seed), 0, None
        run_file = write_run(
            folder,
            parallel=parallel,
            train={
                "steps": STEPS,
                **(train or {}),
            },
            checkpoint={"save_every": 6, "keep_last": KEEP},
            eval={"every": 5, "batches": 4},
        )
        (folder / "marks").mkdir()
        self._submit = lambda name: Job(
            cluster,
            run_file,
            folder / name,
            python=python,
            MARKS=str(folder / "marks"),
            MARKS_SLOW="0.02",
        )
        undisturbed = self._submit("undisturbed")
        assert undisturbed.wait() == "COMPLETED", undisturbed.log()
        self._new_run()

    def _new_run(self):
        self._runs += 1
        self.job = self._submit(f"run-{self._runs}")

    @property
    def output(self):
        return self.folder / f"run-{self._runs}"

    # -- one trial -------------------------------------------------------------------------------

    def run_trial(self, find):
        """Kills the rank that `find(job)` returns, checks the run folder and restarts.

        Compares the run instead if it is complete before the kill.
        """
        before = complete_steps(self.output)
        target = find(self.job)
        if target is None or (hit := self._kill(*target)) is None:
            self._compare()
            self._new_run()
            return
        self.hits.append(hit)
        self._check_folder(before)
        newest = max(complete_steps(self.output), default=None)
        if self._random.random() < 0.25:
            self.job.requeue()
        else:
            self.job = self._submit(self.output.name)
        message = (
            "starting from scratch"
            if newest is None
            else f"resuming from {self.output}/checkpoints/step-{newest:08d}"
        )
        self.job.until(lambda: message in self.job.log(), message)

    def missing(self, times):
        """Returns the phases with fewer hits than `times`."""
        counts = Counter(hit.phase for hit in self.hits)
        return [phase for phase in PHASES if counts[phase] < times]

    def in_phase(self, job):
        """Returns a rank in a phase that needs more hits, some time after it entered the phase."""
        # Loading requires a checkpoint.
        phases = [
            phase for phase in self.missing(2) if phase != "loading" or complete_steps(self.output)
        ]
        phase = self._random.choice(phases or ["saving"])
        # Rank 0 publishes a checkpoint, often when other ranks have written all of it.
        rank = 0 if phase == "saving" and self._random.random() < 0.6 else self._random.randrange(4)
        times, pause = (
            self._random.randint(1, MAX_ENTRY[phase]),
            self._random.random() * MAX_PAUSE[phase],
        )
        state = self._wait_for_state(
            job, rank, lambda state: phase in state.active and state.entered[phase] >= times
        )
        time.sleep(pause)
        return state and (rank, state)

    def some_time(self, job):
        """Returns a rank some time after it has started."""
        rank, pause = self._random.randrange(4), self._random.random() * 4
        state = self._wait_for_state(job, rank, lambda state: True)
        time.sleep(pause)
        return state and (rank, state)

    def _wait_for_state(self, job, rank, condition) -> State | None:
        """Returns the marks of a rank once the condition holds; None if the job ends before."""
        until = time.monotonic() + TIMEOUT
        for poll in range(10**9):
            state = job.mark(rank)
            if state is not None and state.entered["stepping"] > 1 and self._killed_at is not None:
                self.recovery_seconds.append(time.monotonic() - self._killed_at)
                self._killed_at = None
            if state is not None and condition(state):
                return state
            if poll % 200 == 199 and job.state in ENDED:
                return None
            assert time.monotonic() < until, job.log()
            time.sleep(0.002)
        return None

    def _kill(self, rank, state) -> Hit | None:
        killed_at = time.monotonic()
        try:
            os.kill(state.process, signal.SIGKILL)
        except ProcessLookupError:
            killed_at = None
        ended = self.job.wait()
        if ended == "COMPLETED":
            return None
        assert killed_at is not None, self.job.log()
        assert ended == "FAILED", self.job.log()
        self._killed_at = killed_at
        marks = self.job.mark(rank)
        assert marks is not None
        return Hit(
            marks.phase,
            rank,
            time.monotonic() - killed_at,
            re.search(rf"^rank {rank} .*(ended|was killed)", self.job.log(), re.MULTILINE)
            is not None,
        )

    # -- checks ----------------------------------------------------------------------------------

    def _check_folder(self, before):
        """Asserts that no checkpoint is lost, no process is left and steps are in order."""
        now = complete_steps(self.output)
        saved = re.findall(r"^saved \S+/step-(\d+) ", self.job.log(), re.MULTILINE)
        reported = [int(step) for step in saved]
        assert max([0, *before, *reported]) <= max([0, *now]), (before, reported, now)
        assert len(now) >= min(len(before), KEEP)
        assert rank_processes(self.output) == []
        steps = [line["step"] for line in metrics(self.output)]
        assert steps == list(range(len(steps))), steps
        assert last_step(self.output) >= max([0, *now])

    def _compare(self):
        assert_same(self.output, self.folder / "undisturbed", STEPS)

    def finish(self):
        """Waits for the last job, compares it and prints a summary of all hits."""
        assert self.job.wait() == "COMPLETED", self.job.log()
        self._compare()
        hits = ", ".join(
            f"{count} {phase}"
            for phase, count in sorted(Counter(hit.phase for hit in self.hits).items())
        )
        named = sum(hit.is_named for hit in self.hits)
        ends = sorted(hit.seconds for hit in self.hits)
        recovery = ""
        if seconds := self.recovery_seconds:
            recovery = (
                f"; training again {statistics.median(seconds):.1f} s after it, max "
                f"{max(seconds):.1f} s"
            )
        print(
            f"\n{len(self.hits)} kills ({hits}) in {self._runs} runs, "
            f"{named} with the rank named; "
            f"the job's end {statistics.median(ends):.1f} s after a kill, "
            f"max {ends[-1]:.1f} s{recovery}"
        )
