"""Rank 0's watchdog: all others' are connected to it, it says the run's one message, and has all ranks end.

    a rank has not got on for hang_timeout    it calls; all are asked what they are in, and for how long
    another got on later, by more than a look  nothing is wrong, and the question is put again in time
    none did                                   all write their stacks, the one message is said, all end

    a rank fails                               it reports; the cause is said, all end
    a connection ends without a goodbye        its rank is dead: that is said, all end

While all is well nothing is sent. Under a supervisor ranks that fail are its business, and only stalls are this file's.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from selectors import EVENT_READ
from typing import Any

from megatrain.distributed.activity import RankActivity
from megatrain.launch.diagnosis import ProcessState
from megatrain.launch.failure_reporter import (
    FailureReporter,
    ProcessId,
    claim_reporter,
    current_process,
    format_stall,
)
from megatrain.launch.failures import SECONDS_FOR_CAUSES, FailureReport, RankExit, find_cause
from megatrain.launch.transport import JsonConnection, Message
from megatrain.launch.watchdog_thread import LOOK_SECONDS, PATIENCE, WatchdogThread

_SECONDS_TO_DUMP = 5.0
_SECONDS_FOR_DEATHS = 0.5
"""How long a death waits for a report that was sent before it: the reason may be another rank's."""
_ASK_AGAIN = 5.0
"""The least number of seconds between two questions."""


class _Question:
    """Put to all ranks: their states, and after those their stacks."""

    def __init__(self) -> None:
        self.states: dict[int, ProcessState] = {}
        self.dumped: dict[int, ProcessState] | None = None
        """What came with stacks; None until those are asked for."""
        self.until = time.monotonic() + PATIENCE


class WatchdogCoordinator(WatchdogThread):
    """Listens on `listener` for ranks that know the token."""

    def __init__(
        self,
        activity: RankActivity,
        voice: FailureReporter,
        listener: socket.socket,
        *,
        token: str,
        hang_timeout: float,
    ) -> None:
        super().__init__(activity, voice, hang_timeout=hang_timeout)
        self._token, self._listener = token, listener
        self._wires: dict[int, JsonConnection] = {}
        self._who: dict[int, ProcessId] = {self.rank: current_process()}
        self._left: set[int] = set()
        self._failures: list[FailureReport | RankExit] = []
        self._judge_at: float | None = None
        self._question: _Question | None = None
        self._next_question = 0.0
        self.selector.register(listener, EVENT_READ, data=self._accept)

    def tell(self, failure: FailureReport) -> None:
        self._failures.append(failure)
        self.wake()
        self.wait_for_the_end()

    def turn(self) -> None:
        super().turn()
        if self._failures:
            self._judge()
        if self.stands_still():
            self._ask()
        if self._question is not None:
            self._go_on_with(self._question)

    def part(self) -> None:
        self._broadcast({"kind": "bye"})
        for wire in self._wires.values():
            wire.close()
        self._listener.close()

    # -- connections -------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one that is gone already
            wire = JsonConnection(listener.accept()[0])
            self.selector.register(wire, EVENT_READ, data=self._greet)

    def _greet(self, wire: JsonConnection) -> None:
        """The first words of a connection: whose it is."""
        messages = wire.receive()
        self.selector.unregister(wire)
        if not messages or messages[0].get("token") != self._token:
            wire.close()
            return
        hello = messages[0]
        rank = hello["rank"]
        self._wires[rank], self._who[rank] = wire, ProcessId(hello["host"], hello["pid"])
        self.selector.register(wire, EVENT_READ, data=lambda wire: self._hear(rank, wire))
        for message in messages[1:]:
            self._take(rank, message)

    def _hear(self, rank: int, wire: JsonConnection) -> None:
        messages = wire.receive()
        for message in messages or []:
            self._take(rank, message)
        if messages is None and rank in self._wires:
            self._lose(rank)
            if not self.voice.is_supervised:
                self._failures.append(RankExit(rank, None, time.time(), str(self._who[rank])))

    def _lose(self, rank: int) -> None:
        wire = self._wires.pop(rank)
        self.selector.unregister(wire)
        wire.close()

    def _take(self, rank: int, message: Message) -> None:
        match message["kind"]:
            case "stalled":
                self._wires[rank].send({"kind": "heard"})
                self._ask()
            case "state" if self._question is not None:
                self._question.states[rank] = ProcessState.from_json(message["state"])
            case "dumped" if self._question is not None and self._question.dumped is not None:
                self._question.dumped[rank] = ProcessState.from_json(message["state"])
            case "failed":
                self._failures.append(FailureReport(**message["report"]))
            case "bye":
                self._left.add(rank)
                self._lose(rank)

    def _broadcast(self, message: Mapping[str, Any]) -> None:
        for wire in list(self._wires.values()):
            wire.send(message)

    # -- ranks that fail ---------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Say the cause: at once what a rank reports, a little later what is known only by its effect."""
        now, cause = time.time(), find_cause(self._failures)
        first = cause or min(self._failures, key=lambda failure: failure.time)
        wait = (
            SECONDS_FOR_CAUSES
            if cause is None
            else _SECONDS_FOR_DEATHS
            if isinstance(cause, RankExit)
            else 0.0
        )
        if self._judge_at is None or now + wait < self._judge_at:
            self._judge_at = now + wait
        if now >= self._judge_at:
            self._end(first, step=self.pulse.state().step)

    def _end(self, failure: FailureReport | RankExit, *, step: int | None = None) -> None:
        if not claim_reporter(self.voice.folder, self._token):
            self.voice.leave("another rank has spoken, as this one did not answer for a while")
        text = self.voice.say(failure, step=step)
        self._broadcast({"kind": "end", "text": text})
        self.voice.leave(text)

    # -- a run that stands still -------------------------------------------------------------------------------------

    def _ask(self) -> None:
        if self._question is None and time.monotonic() >= self._next_question:
            self._question = _Question()
            self._broadcast({"kind": "ask"})

    def _go_on_with(self, question: _Question) -> None:
        late = time.monotonic() > question.until
        expected = set(range(self.world_size)) - self._left
        answers = question.states if question.dumped is None else question.dumped
        answers[self.rank] = self.pulse.state()
        if not late and not answers.keys() >= (
            expected if question.dumped is None else question.states.keys()
        ):
            return
        youngest = min(state.age for state in answers.values())
        if (
            youngest < self.hang_timeout - 2 * LOOK_SECONDS
        ):  # somebody works, and the others wait for it
            self._question = None
            self._next_question = time.monotonic() + max(_ASK_AGAIN, self.hang_timeout - youngest)
        elif question.dumped is None:
            question.dumped, question.until = {}, time.monotonic() + _SECONDS_TO_DUMP
            self._broadcast({"kind": "dump"})
            self.voice.dump(answers[self.rank])
        else:
            self._say_it_stands_still({**question.states, **question.dumped}, expected)

    def _say_it_stands_still(self, states: dict[int, ProcessState], expected: set[int]) -> None:
        text = format_stall(
            states,
            self._who,
            sorted(expected - set(states)),
            self.voice.folder,
            seconds=min(state.age for state in states.values()),
        )
        self._end(
            FailureReport(self.rank, "stall", text, time.time()),
            step=min(state.step for state in states.values()),
        )
