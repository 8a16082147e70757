"""The watchdog of every rank but 0: it answers rank 0's, and notices when that is gone."""

from __future__ import annotations

import time
from selectors import EVENT_READ

from megatrain.distributed.activity import RankActivity
from megatrain.launch.failure_reporter import (
    FailureReporter,
    ProcessId,
    claim_reporter,
    current_process,
    format_stall,
)
from megatrain.launch.failures import FailureReport, RankExit
from megatrain.launch.transport import JsonConnection, Message
from megatrain.launch.watchdog_thread import PATIENCE, WatchdogThread

_CALL_EVERY = 10.0
"""Seconds after which rank 0 is called again while nothing moves."""
_OTHERS_SECONDS = 3.0
"""How long the one that speaks leaves the others to write their stacks, and these it to speak: who leaves first is a launcher's cause."""


class WatchdogPeer(WatchdogThread):
    """Rank 0's process is `hub`."""

    def __init__(
        self,
        activity: RankActivity,
        voice: FailureReporter,
        wire: JsonConnection,
        *,
        token: str,
        hub: ProcessId,
        hang_timeout: float,
    ) -> None:
        super().__init__(activity, voice, hang_timeout=hang_timeout)
        self._wire, self._hub, self._token = wire, hub, token
        self._called: float | None = None
        """When rank 0 was called and has not answered since."""
        self._next_call = 0.0
        self.selector.register(wire, EVENT_READ, data=self._hear)
        wire.send(
            {"kind": "hello", "token": token, "rank": self.rank, **current_process()._asdict()}
        )

    def tell(self, failure: FailureReport) -> None:
        if not self.closing:
            self._wire.send({"kind": "failed", "report": failure._asdict()})
        self.wait_for_the_end()  # also of what is said in a lost rank 0's place; at once where rank 0 has finished

    def turn(self) -> None:
        super().turn()
        if self.closing or not self.stands_still():
            self._called = None
            return
        now = time.monotonic()
        if self._called is None and now >= self._next_call:
            self._called, self._next_call = now, now + _CALL_EVERY
            self._wire.send({"kind": "stalled"})
        elif self._called is not None and now - self._called > PATIENCE:
            self._rank_0_is_frozen()

    def part(self) -> None:
        self._wire.send({"kind": "bye"})
        self.selector.unregister(self._wire)
        self._wire.close()

    def _hear(self, wire: JsonConnection) -> None:
        messages = wire.receive()
        if messages is None:
            self._rank_0_is_gone()
        for message in messages or []:
            self._take(message)

    def _take(self, message: Message) -> None:
        match message["kind"]:
            case "heard":
                self._called = None
            case "ask":
                self._wire.send({"kind": "state", "state": self.pulse.state().to_json()})
            case "dump":
                state = self.pulse.state()
                self.voice.dump(state)
                self._wire.send({"kind": "dumped", "state": state.to_json()})
            case "end":
                self.voice.leave(message["text"])
            case "bye":
                self.closing = True  # rank 0 has finished: from here on each speaks for itself

    def _rank_0_is_gone(self) -> None:
        self.closing = True
        if self.voice.is_supervised:
            return  # who sees it too, and why
        text = f"rank 0 ({self._hub}) ended without a word"
        if self._speaks():
            text = self.voice.say(
                RankExit(0, None, time.time(), str(self._hub)), step=self.pulse.state().step
            )
        else:
            time.sleep(_OTHERS_SECONDS)
        self.voice.leave(text)

    def _rank_0_is_frozen(self) -> None:
        state = self.pulse.state()
        self.voice.dump(state)
        text = format_stall(
            {self.rank: state}, {0: self._hub}, [0], self.voice.folder, seconds=state.age
        )
        if self._speaks():
            time.sleep(_OTHERS_SECONDS)
            self.voice.say(FailureReport(0, "stall", text, time.time()), step=state.step)
        else:  # a supervisor ends all once it is told
            time.sleep(2 * PATIENCE if self.voice.is_supervised else 2 * _OTHERS_SECONDS)
        self.voice.leave(text)

    def _speaks(self) -> bool:
        """In rank 0's place, where nobody can be asked who is there: the first that wants to."""
        return claim_reporter(self.voice.folder, self._token)
