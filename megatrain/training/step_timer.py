"""How a rank spent a step: seconds in forwards, in backwards, and waiting for its neighbours. Nothing is held up to know it.

The executor calls `lap` as it passes from one to the next. On CPUs that reads the clock. On a GPU it puts an event on the
stream, where the work is done and waited for; events are read once the step's loss has come back from there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from megatrain.pipeline.executor import Executor, TimedPhase

KINDS: dict[TimedPhase, str] = {
    "arrival": "waiting",
    "F": "forward",
    "B": "backward",
    "I": "backward",
    "W": "backward",
}
"""What the time before a lap's end counts as; before any other it is not the pipeline's."""


class StepTimer:
    """Laps of one step on one rank."""

    def __init__(self, device: torch.device) -> None:
        self.on_stream = device.type == "cuda"
        self._laps: list[tuple[TimedPhase, Any]] = []

    def lap(self, ended: TimedPhase) -> None:
        if self.on_stream:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._laps.append((ended, event))
        else:
            self._laps.append((ended, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """By kind; empty where no lap was taken. On a GPU it waits for what has been asked of the stream."""
        if self.on_stream and self._laps:
            self._laps[-1][1].synchronize()
        sums = dict.fromkeys(KINDS.values(), 0.0) if self._laps else {}
        for (_, start), (ended, end) in pairwise(self._laps):
            if ended in KINDS:
                sums[KINDS[ended]] += (
                    start.elapsed_time(end) / 1e3 if self.on_stream else end - start
                )
        return sums


@contextlib.contextmanager
def timed(executor: Executor, *, wanted: bool) -> Iterator[StepTimer]:
    """Take the laps of what the executor does inside, if `wanted`."""
    stopwatch, before = StepTimer(executor.device), executor.timing
    executor.timing = stopwatch.lap if wanted else before
    try:
        yield stopwatch
    finally:
        executor.timing = before
