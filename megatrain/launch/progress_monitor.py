"""Since when a rank has not got on, as seen from beside its main thread."""

from __future__ import annotations

import resource
import time

from megatrain.distributed.activity import RankActivity
from megatrain.launch.diagnosis import ProcessState, compact

_BUSY = 0.005
"""The share of a core above which a rank in an open-ended phase is at work: one that sleeps takes nothing."""
_BLIND = 5.0
"""Seconds between two looks after which nothing is known of the time between: the whole process may have been stopped."""


class ProgressMonitor:
    """Looked at every second or so, by one thread."""

    def __init__(self, activity: RankActivity) -> None:
        self.activity = activity
        self._count, self._since, self._looked = activity.count, time.monotonic(), time.monotonic()
        self._cpu, self._faults = _work_done()

    def look(self) -> float:
        """Seconds since the rank last got on, or was last known to."""
        now, (cpu, faults) = time.monotonic(), _work_done()
        passed = now - self._looked
        works = cpu - self._cpu > _BUSY * passed or faults > self._faults
        if (
            self.activity.count != self._count
            or passed > _BLIND
            or (self.activity.open_ended and not self.activity.waits_for and works)
        ):
            self._since = now
        self._count, self._looked, self._cpu, self._faults = self.activity.count, now, cpu, faults
        return now - self._since

    def state(self) -> ProcessState:
        return ProcessState(
            self.activity.step,
            self.activity.describe(),
            compact(self.activity.waits_for),
            self.look(),
        )


def _work_done() -> tuple[float, int]:
    """Seconds of CPU time of all threads but this one, and pages read in from files."""
    return time.process_time() - time.thread_time(), resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_majflt
