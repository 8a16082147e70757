"""kill -9 of any rank at any moment: nothing that was whole is lost, and the run ends as if nothing had happened.

A trial names a phase, waits until the chosen rank is in it, lets a random time pass, and kills. What was hit is read from what
the dead rank has left (marks.py), and trials go on until each phase was hit as often as asked.
"""

from __future__ import annotations

import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.fault_marks import PHASES, State
from helpers.slurm_jobs import (
    ENDED,
    TIMEOUT,
    Job,
    assert_same,
    last_step,
    metrics,
    rank_processes,
    whole,
    write_run,
)

pytestmark = pytest.mark.chaos
STEPS, KEEP = 120, 3
LAYOUTS = {
    "pipeline2-data2": ({"pipeline": 2, "data": 2}, {}),
    "tensor2-pipeline2-bf16": ({"tensor": 2, "pipeline": 2}, {"dtype": "bf16"}),
    "data4-zero3": ({"data": 4, "zero": 3}, {}),
}
LONGEST = {"loading": 0.15, "stepping": 0.1, "evaluating": 0.1, "saving": 0.5}
"""Seconds up to which a rank is left alone in a phase before it is killed: about as long as the phase takes."""
OFTEN = {"loading": 1, "stepping": 15, "evaluating": 3, "saving": 3}
"""In which of the job's first so many entries into a phase."""


class Hit(NamedTuple):
    phase: str
    rank: int
    seconds: float
    """From the kill to the end of the job."""
    is_named: bool
    """Whether the job's words say which rank ended, beside what Slurm says."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_in_each_phase_and_started_again(layout, cluster, warm, tmp_path):
    parallel, train = LAYOUTS[layout]
    trials = Trials(cluster, warm, tmp_path, seed=layout, parallel=parallel, train=train)
    while missing := trials.missing(2):
        assert len(trials.hits) < 20, (
            f"after 20 kills these were not hit as often as asked: {missing}"
        )
        trials.go_on(trials.in_phase)
    trials.finish()


def test_killed_at_any_moment_from_the_start_and_queued_again(cluster, warm, tmp_path):
    trials = Trials(cluster, warm, tmp_path, seed="any moment")
    while len(trials.hits) < 4:
        trials.go_on(trials.some_time)
    trials.finish()


class Trials:
    """Jobs of one run, each killed, until the run is through; then of another. Each is held to an undisturbed one when it is."""

    def __init__(self, cluster, python, folder, *, seed, parallel=None, train=None) -> None:
        self.folder, self.hits, self.again = folder, [], []
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
        assert undisturbed.wait() == "COMPLETED", undisturbed.words()
        self._new_run()

    def _new_run(self):
        self._runs += 1
        self.job = self._submit(f"run-{self._runs}")

    @property
    def output(self):
        return self.folder / f"run-{self._runs}"

    # -- one trial ---------------------------------------------------------------------------------------------------

    def go_on(self, find):
        """Kill what `find(job)` names, see that nothing is lost, and start again; a run that was through before is compared."""
        before = whole(self.output)
        target = find(self.job)
        if target is None or (hit := self._kill(*target)) is None:
            self._compare()
            self._new_run()
            return
        self.hits.append(hit)
        self._look(before)
        newest = max(whole(self.output), default=None)
        if self._random.random() < 0.25:
            self.job.requeue()
        else:
            self.job = self._submit(self.output.name)
        from_there = (
            "starting from scratch"
            if newest is None
            else f"resuming from {self.output}/checkpoints/step-{newest:08d}"
        )
        self.job.until(lambda: from_there in self.job.words(), from_there)

    def missing(self, times):
        """The phases that were not hit so often yet."""
        counts = Counter(hit.phase for hit in self.hits)
        return [phase for phase in PHASES if counts[phase] < times]

    def in_phase(self, job):
        """A rank in a phase that was hit too rarely yet, once it has been there for a while. Loading needs something to load."""
        phases = [phase for phase in self.missing(2) if phase != "loading" or whole(self.output)]
        phase = self._random.choice(phases or ["saving"])
        # Rank 0 publishes: of a checkpoint that others wrote, all may be there when one of them is killed.
        rank = 0 if phase == "saving" and self._random.random() < 0.6 else self._random.randrange(4)
        times, pause = self._random.randint(1, OFTEN[phase]), self._random.random() * LONGEST[phase]
        state = self._once(
            job, rank, lambda state: phase in state.active and state.entered[phase] >= times
        )
        time.sleep(pause)
        return state and (rank, state)

    def some_time(self, job):
        """A rank some time after it began."""
        rank, pause = self._random.randrange(4), self._random.random() * 4
        state = self._once(job, rank, lambda state: True)
        time.sleep(pause)
        return state and (rank, state)

    def _once(self, job, rank, condition) -> State | None:
        """What a rank has left once it is so; None where the job ends before."""
        until = time.monotonic() + TIMEOUT
        for look in range(10**9):
            state = job.mark(rank)
            if state is not None and state.entered["stepping"] > 1 and self._killed_at is not None:
                self.again.append(time.monotonic() - self._killed_at)
                self._killed_at = None
            if state is not None and condition(state):
                return state
            if look % 200 == 199 and job.state in ENDED:
                return None
            assert time.monotonic() < until, job.words()
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
        assert killed_at is not None, self.job.words()
        assert ended == "FAILED", self.job.words()
        self._killed_at = killed_at
        left = self.job.mark(rank)
        assert left is not None
        return Hit(
            left.phase,
            rank,
            time.monotonic() - killed_at,
            re.search(rf"^rank {rank} .*(ended|was killed)", self.job.words(), re.MULTILINE)
            is not None,
        )

    # -- what must hold ----------------------------------------------------------------------------------------------

    def _look(self, before):
        """Nothing that was whole, or said to be, is lost; nobody is left; what is written of steps is in order."""
        now, said = (
            whole(self.output),
            [
                int(step)
                for step in re.findall(r"^saved \S+/step-(\d+) ", self.job.words(), re.MULTILINE)
            ],
        )
        assert max([0, *before, *said]) <= max([0, *now]), (before, said, now)
        assert len(now) >= min(len(before), KEEP)
        assert rank_processes(self.output) == []
        steps = [line["step"] for line in metrics(self.output)]
        assert steps == list(range(len(steps))), steps
        assert last_step(self.output) >= max([0, *now])

    def _compare(self):
        assert_same(self.output, self.folder / "undisturbed", STEPS)

    def finish(self):
        """Let the last job go through."""
        assert self.job.wait() == "COMPLETED", self.job.words()
        self._compare()
        hits = ", ".join(
            f"{count} {phase}"
            for phase, count in sorted(Counter(hit.phase for hit in self.hits).items())
        )
        named = sum(hit.is_named for hit in self.hits)
        ends = sorted(hit.seconds for hit in self.hits)
        again = (
            f"; training again {statistics.median(self.again):.1f} s after it, {max(self.again):.1f} s at most"
            if self.again
            else ""
        )
        print(
            f"\n{len(self.hits)} kills ({hits}) in {self._runs} runs, {named} with the rank named; the job's end {statistics.median(ends):.1f} s "
            f"after a kill, {ends[-1]:.1f} s at most{again}"
        )
