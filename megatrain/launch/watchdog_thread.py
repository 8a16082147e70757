"""What every rank's watchdog does: it sleeps on its connections, looks at the rank's pulse, and can be woken by the rank."""

from __future__ import annotations

import selectors
import socket
import threading
from typing import Any

from megatrain.distributed.activity import RankActivity
from megatrain.launch.failure_reporter import FailureReporter
from megatrain.launch.failures import FailureReport
from megatrain.launch.progress_monitor import ProgressMonitor

LOOK_SECONDS = 1.0
PATIENCE = 10.0
"""Seconds within which a watchdog answers, on a machine however busy. Half a second is more than it takes."""
TELL_SECONDS = 12.0
"""How long a failed rank waits for the one message of the run before it speaks for itself."""


class WatchdogThread:
    """A thread beside the rank's main one, from `start` to `close`; it holds no process group and no store.

    Args:
        hang_timeout: without progress that make a stall; 0 leaves only the watch over ranks that end.
    """

    def __init__(
        self, activity: RankActivity, voice: FailureReporter, *, hang_timeout: float
    ) -> None:
        self.pulse, self.voice, self.hang_timeout = ProgressMonitor(activity), voice, hang_timeout
        self.rank, self.world_size = voice.place.rank, voice.place.world_size
        self.selector = selectors.DefaultSelector()
        self._wake_here, self._wake_there = socket.socketpair()
        self._wake_here.setblocking(False)
        self.selector.register(self._wake_here, selectors.EVENT_READ, data=self._awoken)
        self.closing = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """The rank has finished."""
        self.closing = True
        self.wake()
        self._thread.join(PATIENCE)

    def tell(self, failure: FailureReport) -> None:
        """The rank has failed: the process ends here once the run's one message is said. Returns when nobody says it."""
        raise NotImplementedError

    def wake(self) -> None:
        self._wake_there.send(b".")

    def wait_for_the_end(self) -> None:
        """In the main thread, while this one says what there is to say and ends the process."""
        self._thread.join(TELL_SECONDS)

    def _run(self) -> None:
        while not self.closing:
            self.turn()
        self.part()
        self.selector.close()

    def turn(self) -> None:
        """Hear and do what there is to, within a second."""
        for key, _ in self.selector.select(LOOK_SECONDS):
            key.data(key.fileobj)

    def part(self) -> None:
        """Say goodbye."""

    def stands_still(self) -> bool:
        age = self.pulse.look()
        return 0 < self.hang_timeout <= age

    def _awoken(self, wake: Any) -> None:
        wake.recv(1024)
