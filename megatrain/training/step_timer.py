"""The time that a rank spends in forwards, in backwards and in waiting for its neighbours.

The executor calls `lap` at the end of each action. On CPUs a lap reads the clock. On GPUs it
records an event on the stream; the events are read once the loss has come back, so the host never
waits for them.
"""

from __future__ import annotations

import time
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
"""The kind of the time before the end of a lap. Other laps are not part of the pipeline."""


class StepTimer:
    """Times the laps of an executor from its creation until `stop`."""

    def __init__(self, executor: Executor) -> None:
        self.on_stream = executor.device.type == "cuda"
        self._laps: list[tuple[TimedPhase, Any]] = []
        self._executor, self._previous = executor, executor.timing
        executor.timing = self.lap

    def lap(self, ended: TimedPhase) -> None:
        """Records the end of a lap."""
        if self.on_stream:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._laps.append((ended, event))
        else:
            self._laps.append((ended, time.perf_counter()))

    def stop(self) -> None:
        """Gives the executor its previous lap function back."""
        self._executor.timing = self._previous

    def seconds(self) -> dict[str, float]:
        """Returns the seconds by kind; empty without laps. On a GPU this waits for the stream."""
        if self.on_stream and self._laps:
            self._laps[-1][1].synchronize()
        sums = dict.fromkeys(KINDS.values(), 0.0) if self._laps else {}
        for (_, start), (ended, end) in pairwise(self._laps):
            if ended in KINDS:
                sums[KINDS[ended]] += (
                    start.elapsed_time(end) / 1e3 if self.on_stream else end - start
                )
        return sums
