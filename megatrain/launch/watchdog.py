"""The watchdogs of a run: rank 0 coordinates, the other ranks connect to it.

    a rank makes no progress for hang_timeout  it sends "stalled"; rank 0 asks all ranks for their
                                               state and the age of their last progress
    a rank made progress since then            no stall; rank 0 asks again later
    no rank made progress                      all write their stacks; the stall is reported once;
                                               all exit

    a rank fails                               it sends its report; the cause is reported; all exit
    a connection closes without a "bye"        its rank is dead; this is reported; all exit

Without a problem no message is sent. Under a supervisor, which handles ranks that fail, the
watchdogs handle stalls only.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Mapping
from selectors import EVENT_READ
from typing import TYPE_CHECKING, Any

from megatrain.distributed.activity import RankActivity
from megatrain.errors import UserError
from megatrain.launch.diagnosis import RankState
from megatrain.launch.failure_reporter import (
    FailureReporter,
    ProcessId,
    claim_reporter,
    clear_claims,
    current_process,
    format_stall,
)
from megatrain.launch.failures import (
    SECONDS_FOR_CAUSES,
    Failure,
    FailureReport,
    RankExit,
    find_cause,
)
from megatrain.launch.transport import JsonConnection, Message, connect, listen
from megatrain.launch.watchdog_thread import ANSWER_TIMEOUT, POLL_SECONDS, WatchdogThread

if TYPE_CHECKING:
    from torch.distributed import Store

_STORE_KEY = "megatrain/watchdog"
_DUMP_TIMEOUT = 5.0
_SECONDS_FOR_REPORTS = 0.5
"""Time that a dead connection waits for a report sent before it, which may name the cause."""
_MIN_QUERY_INTERVAL = 5.0
_STALLED_INTERVAL = 10.0
"""Seconds after which a peer sends "stalled" again while nothing progresses."""
_EXIT_DELAY = 3.0
"""Time for the other ranks to write their stacks, and for the reporting rank to report.

The first process that exits is what a launcher reports as the cause.
"""


def start_watchdog(
    activity: RankActivity, reporter: FailureReporter, store: Store, *, hang_timeout: float
) -> WatchdogThread:
    """Starts this rank's watchdog; all ranks call it together.

    A token, shared through the store, keeps out processes that are not ranks of the run. Raises
    UserError if rank 0's watchdog cannot be reached.
    """
    start = _start_coordinator if reporter.env.rank == 0 else _start_peer
    watchdog = start(activity, reporter, store, hang_timeout)
    watchdog.start()
    return watchdog


def _start_coordinator(
    activity: RankActivity, reporter: FailureReporter, store: Store, hang_timeout: float
) -> WatchdogThread:
    clear_claims(reporter.folder)
    listener = listen(reporter.env.master_addr, peers=reporter.env.world_size)
    token = secrets.token_hex(16)
    port = listener.getsockname()[1]
    store.set(_STORE_KEY, json.dumps({"port": port, "token": token, "process": current_process()}))
    return WatchdogCoordinator(activity, reporter, listener, token=token, hang_timeout=hang_timeout)


def _start_peer(
    activity: RankActivity, reporter: FailureReporter, store: Store, hang_timeout: float
) -> WatchdogThread:
    coordinator = json.loads(store.get(_STORE_KEY))
    address, port = reporter.env.master_addr, coordinator["port"]
    try:
        connection = connect(address, port)
    except OSError as error:
        raise UserError(
            f"rank {reporter.env.rank} ({current_process()}) cannot reach rank 0's watchdog at "
            f"{address}:{port} ({error}); the machines of a run must reach each other on any "
            "port, as gloo and NCCL require too"
        ) from None
    return WatchdogPeer(
        activity,
        reporter,
        connection,
        token=coordinator["token"],
        coordinator=ProcessId(*coordinator["process"]),
        hang_timeout=hang_timeout,
    )


class _Query:
    """A query to all ranks: first for their states, then for their stacks."""

    def __init__(self) -> None:
        self.states: dict[int, RankState] = {}
        self.dumped: dict[int, RankState] | None = None
        """The states sent after the stacks were written; None until the stacks are requested."""
        self.deadline = time.monotonic() + ANSWER_TIMEOUT


class WatchdogCoordinator(WatchdogThread):
    """The watchdog of rank 0. Accepts connections of ranks that know the token."""

    def __init__(
        self,
        activity: RankActivity,
        reporter: FailureReporter,
        listener: socket.socket,
        *,
        token: str,
        hang_timeout: float,
    ) -> None:
        super().__init__(activity, reporter, hang_timeout=hang_timeout)
        self._token = token
        self._listener = listener
        self._connections: dict[int, JsonConnection] = {}
        self._processes: dict[int, ProcessId] = {self.rank: current_process()}
        self._finished: set[int] = set()
        self._failures: list[Failure] = []
        self._report_at: float | None = None
        self._query: _Query | None = None
        self._next_query_at = 0.0
        self.selector.register(listener, EVENT_READ, data=self._accept)

    def report_failure(self, failure: FailureReport) -> None:
        self._failures.append(failure)
        self.wake()
        self.join_report()

    def poll(self) -> None:
        super().poll()
        if self._failures:
            self._report_cause()
        if self.is_stalled():
            self._start_query()
        if self._query is not None:
            self._continue_query(self._query)

    def disconnect(self) -> None:
        self._broadcast({"kind": "bye"})
        for connection in self._connections.values():
            connection.close()
        self._listener.close()

    # -- connections -----------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the peer has closed it already
            connection = JsonConnection(listener.accept()[0])
            self.selector.register(connection, EVENT_READ, data=self._on_hello)

    def _on_hello(self, connection: JsonConnection) -> None:
        """Handles the first message of a connection, which names its rank."""
        messages = connection.receive()
        self.selector.unregister(connection)
        if not messages or messages[0].get("token") != self._token:
            connection.close()
            return
        hello = messages[0]
        rank = hello["rank"]
        self._connections[rank] = connection
        self._processes[rank] = ProcessId(hello["host"], hello["pid"])
        self.selector.register(
            connection, EVENT_READ, data=lambda connection: self._on_readable(rank, connection)
        )
        for message in messages[1:]:
            self._on_message(rank, message)

    def _on_readable(self, rank: int, connection: JsonConnection) -> None:
        messages = connection.receive()
        for message in messages or []:
            self._on_message(rank, message)
        if messages is None and rank in self._connections:
            self._remove(rank)
            if not self.reporter.is_supervised:
                exited = RankExit(rank, None, time.time(), str(self._processes[rank]))
                self._failures.append(exited)

    def _remove(self, rank: int) -> None:
        connection = self._connections.pop(rank)
        self.selector.unregister(connection)
        connection.close()

    def _on_message(self, rank: int, message: Message) -> None:
        query = self._query
        match message["kind"]:
            case "stalled":
                self._connections[rank].send({"kind": "heard"})
                self._start_query()
            case "state" if query is not None:
                query.states[rank] = RankState.from_json(message["state"])
            case "dumped" if query is not None and query.dumped is not None:
                query.dumped[rank] = RankState.from_json(message["state"])
            case "failed":
                self._failures.append(FailureReport(**message["report"]))
            case "bye":
                self._finished.add(rank)
                self._remove(rank)

    def _broadcast(self, message: Mapping[str, Any]) -> None:
        for connection in list(self._connections.values()):
            connection.send(message)

    # -- failed ranks ----------------------------------------------------------------------------

    def _report_cause(self) -> None:
        """Reports a cause at once, and a consequence after the time that its cause may take."""
        now = time.time()
        cause = find_cause(self._failures)
        if cause is None:
            delay = SECONDS_FOR_CAUSES
        else:
            delay = _SECONDS_FOR_REPORTS if isinstance(cause, RankExit) else 0.0
        if self._report_at is None or now + delay < self._report_at:
            self._report_at = now + delay
        if now >= self._report_at:
            failure = cause or min(self._failures, key=lambda failure: failure.time)
            self._end_run(failure, step=self.progress.state().step)

    def _end_run(self, failure: Failure, *, step: int | None = None) -> None:
        if not claim_reporter(self.reporter.folder, self._token):
            self.reporter.exit_process(
                "another rank has reported the failure, because this rank did not answer in time"
            )
        text = self.reporter.report(failure, step=step)
        self._broadcast({"kind": "end", "text": text})
        self.reporter.exit_process(text)

    # -- stalled runs ----------------------------------------------------------------------------

    def _start_query(self) -> None:
        if self._query is None and time.monotonic() >= self._next_query_at:
            self._query = _Query()
            self._broadcast({"kind": "ask"})

    def _continue_query(self, query: _Query) -> None:
        expected = set(range(self.world_size)) - self._finished
        answers = query.states if query.dumped is None else query.dumped
        answers[self.rank] = self.progress.state()
        required = expected if query.dumped is None else query.states.keys()
        if time.monotonic() <= query.deadline and not answers.keys() >= required:
            return
        age = min(state.age for state in answers.values())
        if age < self.hang_timeout - 2 * POLL_SECONDS:  # a rank works, the others wait for it
            self._query = None
            wait = max(_MIN_QUERY_INTERVAL, self.hang_timeout - age)
            self._next_query_at = time.monotonic() + wait
        elif query.dumped is None:
            query.dumped = {}
            query.deadline = time.monotonic() + _DUMP_TIMEOUT
            self._broadcast({"kind": "dump"})
            self.reporter.dump_stacks(answers[self.rank])
        else:
            self._report_stall({**query.states, **query.dumped}, expected)

    def _report_stall(self, states: dict[int, RankState], expected: set[int]) -> None:
        text = format_stall(
            states,
            self._processes,
            sorted(expected - set(states)),
            self.reporter.folder,
            seconds=min(state.age for state in states.values()),
        )
        step = min(state.step for state in states.values())
        self._end_run(FailureReport(self.rank, "stall", text, time.time()), step=step)


class WatchdogPeer(WatchdogThread):
    """The watchdog of every other rank. Answers rank 0's and detects that rank 0 is gone.

    Args:
        connection: the connection to rank 0's watchdog.
        coordinator: rank 0's process.
    """

    def __init__(
        self,
        activity: RankActivity,
        reporter: FailureReporter,
        connection: JsonConnection,
        *,
        token: str,
        coordinator: ProcessId,
        hang_timeout: float,
    ) -> None:
        super().__init__(activity, reporter, hang_timeout=hang_timeout)
        self._connection = connection
        self._coordinator = coordinator
        self._token = token
        self._unanswered_since: float | None = None
        self._next_message_at = 0.0
        self.selector.register(connection, EVENT_READ, data=self._on_readable)
        process = current_process()._asdict()
        connection.send({"kind": "hello", "token": token, "rank": self.rank, **process})

    def report_failure(self, failure: FailureReport) -> None:
        if not self.closing:
            self._connection.send({"kind": "failed", "report": failure._asdict()})
        self.join_report()  # returns at once if rank 0 has finished

    def poll(self) -> None:
        super().poll()
        if self.closing or not self.is_stalled():
            self._unanswered_since = None
            return
        now = time.monotonic()
        if self._unanswered_since is None and now >= self._next_message_at:
            self._unanswered_since = now
            self._next_message_at = now + _STALLED_INTERVAL
            self._connection.send({"kind": "stalled"})
        elif self._unanswered_since is not None and now - self._unanswered_since > ANSWER_TIMEOUT:
            self._on_coordinator_frozen()

    def disconnect(self) -> None:
        self._connection.send({"kind": "bye"})
        self.selector.unregister(self._connection)
        self._connection.close()

    def _on_readable(self, connection: JsonConnection) -> None:
        messages = connection.receive()
        if messages is None:
            self._on_coordinator_gone()
        for message in messages or []:
            self._on_message(message)

    def _on_message(self, message: Message) -> None:
        match message["kind"]:
            case "heard":
                self._unanswered_since = None
            case "ask":
                state = self.progress.state()
                self._connection.send({"kind": "state", "state": state.to_json()})
            case "dump":
                state = self.progress.state()
                self.reporter.dump_stacks(state)
                self._connection.send({"kind": "dumped", "state": state.to_json()})
            case "end":
                self.reporter.exit_process(message["text"])
            case "bye":
                self.closing = True  # rank 0 has finished: every rank now reports by itself

    def _on_coordinator_gone(self) -> None:
        self.closing = True
        if self.reporter.is_supervised:
            return  # the supervisor detects it too, with the reason
        exited = RankExit(0, None, time.time(), str(self._coordinator))
        text = f"rank 0 ({self._coordinator}) exited without reporting an error"
        if self._claims_report():
            text = self.reporter.report(exited, step=self.progress.state().step)
        else:
            time.sleep(_EXIT_DELAY)
        self.reporter.exit_process(text)

    def _on_coordinator_frozen(self) -> None:
        state = self.progress.state()
        self.reporter.dump_stacks(state)
        text = format_stall(
            {self.rank: state},
            {0: self._coordinator},
            [0],
            self.reporter.folder,
            seconds=state.age,
        )
        if self._claims_report():
            time.sleep(_EXIT_DELAY)
            self.reporter.report(FailureReport(0, "stall", text, time.time()), step=state.step)
        else:  # a supervisor ends all ranks once it has the report
            time.sleep(2 * ANSWER_TIMEOUT if self.reporter.is_supervised else 2 * _EXIT_DELAY)
        self.reporter.exit_process(text)

    def _claims_report(self) -> bool:
        """Returns True for the first rank that claims to report in rank 0's place."""
        return claim_reporter(self.reporter.folder, self._token)
