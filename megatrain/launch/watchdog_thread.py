"""The thread of a rank's watchdog: waits on its connections and checks the rank's progress."""

from __future__ import annotations

import resource
import selectors
import socket
import threading
import time
from typing import Any

from megatrain.distributed.activity import RankActivity
from megatrain.launch.diagnosis import RankState, compact
from megatrain.launch.failure_reporter import FailureReporter
from megatrain.launch.failures import FailureReport

POLL_SECONDS = 1.0
ANSWER_TIMEOUT = 10.0
"""Time within which a watchdog answers. On a busy machine it takes half a second."""
REPORT_TIMEOUT = 12.0
"""Time for which a failed rank waits for the report of the run before it reports by itself."""

_BUSY_SHARE = 0.005
"""Share of a core above which a rank in an open-ended phase makes progress."""
_MAX_GAP = 5.0
"""Seconds between two polls above which the whole process may have been stopped."""


class WatchdogThread:
    """A thread beside the rank's main thread. It holds no process group and no store.

    Args:
        activity: the rank's activity.
        reporter: reports failures of the run.
        hang_timeout: seconds without progress after which a rank is stalled; 0 disables the
            detection of stalls and keeps the detection of exited ranks.
    """

    def __init__(
        self, activity: RankActivity, reporter: FailureReporter, *, hang_timeout: float
    ) -> None:
        self.progress = ProgressMonitor(activity)
        self.reporter = reporter
        self.hang_timeout = hang_timeout
        self.rank = reporter.env.rank
        self.world_size = reporter.env.world_size
        self.selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self.selector.register(self._wake_reader, selectors.EVENT_READ, data=self._on_wake)
        self.closing = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread: the rank has finished."""
        self.closing = True
        self.wake()
        self._thread.join(ANSWER_TIMEOUT)

    def report_failure(self, failure: FailureReport) -> None:
        """Reports that the rank has failed.

        Ends the process once the failure of the run is reported. Returns if nobody reports it.
        """
        raise NotImplementedError

    def wake(self) -> None:
        """Makes the thread poll at once."""
        self._wake_writer.send(b".")

    def join_report(self) -> None:
        """Blocks the main thread while this thread reports the failure and ends the process."""
        self._thread.join(REPORT_TIMEOUT)

    def poll(self) -> None:
        """Handles messages and checks for stalls; returns within a second."""
        for key, _ in self.selector.select(POLL_SECONDS):
            key.data(key.fileobj)

    def disconnect(self) -> None:
        """Closes the connections in an orderly way."""

    def is_stalled(self) -> bool:
        """Returns True if the rank has made no progress for `hang_timeout` seconds."""
        age = self.progress.seconds_since_progress()
        return 0 < self.hang_timeout <= age

    def _run(self) -> None:
        while not self.closing:
            self.poll()
        self.disconnect()
        self.selector.close()

    def _on_wake(self, reader: Any) -> None:
        reader.recv(1024)


class ProgressMonitor:
    """Measures the time since a rank's last progress. One thread polls it about every second."""

    def __init__(self, activity: RankActivity) -> None:
        self.activity = activity
        self._count = activity.count
        self._progress_at = self._polled_at = time.monotonic()
        self._cpu_seconds, self._page_faults = _process_work()

    def seconds_since_progress(self) -> float:
        """Returns the seconds since the rank made progress, or was last known to."""
        now = time.monotonic()
        cpu_seconds, page_faults = _process_work()
        gap = now - self._polled_at
        is_busy = (
            cpu_seconds - self._cpu_seconds > _BUSY_SHARE * gap or page_faults > self._page_faults
        )
        activity = self.activity
        if (
            activity.count != self._count
            or gap > _MAX_GAP
            or (activity.open_ended and not activity.waits_for and is_busy)
        ):
            self._progress_at = now
        self._count = activity.count
        self._polled_at = now
        self._cpu_seconds, self._page_faults = cpu_seconds, page_faults
        return now - self._progress_at

    def state(self) -> RankState:
        """Returns the rank's state."""
        activity = self.activity
        return RankState(
            activity.step,
            activity.describe(),
            compact(activity.waits_for),
            self.seconds_since_progress(),
        )


def _process_work() -> tuple[float, int]:
    """Returns the CPU seconds of all other threads, and the pages read from files."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.process_time() - time.thread_time(), usage.ru_majflt
