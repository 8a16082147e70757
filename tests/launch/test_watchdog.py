"""Watchdogs of several ranks in one process, with a clock and reporters of the test."""

import contextlib
import select

import pytest

from megatrain.distributed.activity import RankActivity, WorldGroup
from megatrain.distributed.env import RankEnv
from megatrain.launch import watchdog, watchdog_thread
from megatrain.launch.failure_reporter import claim_reporter, clear_claims, current_process
from megatrain.launch.failures import FailureReport, RankExit
from megatrain.launch.transport import connect, listen
from megatrain.launch.watchdog import WatchdogCoordinator, WatchdogPeer
from megatrain.launch.watchdog_thread import ProgressMonitor


class Clock:
    """A clock that the test advances. `cpu` is the CPU time of the process in seconds."""

    def __init__(self):
        self.now, self.cpu = 1000.0, 0.0

    def monotonic(self):
        return self.now

    time = monotonic

    def process_time(self):
        return self.cpu

    def thread_time(self):
        return 0.0

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watchdog_thread, "POLL_SECONDS", 0.0)
    for module in (watchdog, watchdog_thread):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(
        watchdog_thread.resource, "getrusage", lambda who: type("Usage", (), {"ru_majflt": 0})
    )
    return clock


class Exited(Exception):
    """Raised in place of the exit of a process."""


class Reporter:
    """Records reports instead of printing them."""

    def __init__(self, rank, world_size, folder):
        self.env, self.folder = (
            RankEnv(rank, world_size, rank, world_size, "127.0.0.1", 1),
            folder,
        )
        self.reports, self.dumped, self.exit_text, self.is_supervised = [], [], None, False

    def report(self, failure, *, step=None):
        self.reports.append(failure)
        return failure.text if isinstance(failure, FailureReport) else f"exit of {failure.rank}"

    def dump_stacks(self, state):
        self.dumped.append(state.activity)

    def exit_process(self, text):
        self.exit_text = text
        raise Exited


class Ranks:
    """`size` watchdogs in this process without threads; the test polls them."""

    def __init__(self, size, folder, clock, *, hang_timeout=100.0, token="token"):
        self.clock, self.activities = clock, [RankActivity() for _ in range(size)]
        self.reporters = [Reporter(rank, size, folder) for rank in range(size)]
        listener = listen("127.0.0.1", peers=size)
        self.members = [
            WatchdogCoordinator(
                self.activities[0],
                self.reporters[0],
                listener,
                token="token",
                hang_timeout=hang_timeout,
            )
        ]
        for rank in range(1, size):
            connection = connect("127.0.0.1", listener.getsockname()[1])
            self.members.append(
                WatchdogPeer(
                    self.activities[rank],
                    self.reporters[rank],
                    connection,
                    token=token,
                    coordinator=current_process(),
                    hang_timeout=hang_timeout,
                )
            )
        self.frozen = set()
        self.advance()

    def advance(self, seconds=0.0):
        """Advances the clock second by second, and polls until no message is left."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + 1)
            self._poll()
            if self.members[0]._query is not None:
                self._settle()
        self._poll()
        self._settle()

    def _settle(self):
        """Polls until no watchdog has received a message for 30 ms."""
        for _ in range(1000):
            if not select.select([member.selector for member in self._awake()], [], [], 0.03)[0]:
                return
            self._poll()
        raise AssertionError("the watchdogs never stop sending")

    def _poll(self):
        for member in self._awake():
            with contextlib.suppress(Exited):
                member.poll()

    def _awake(self):
        return [
            member
            for rank, member in enumerate(self.members)
            if rank not in self.frozen
            and self.reporters[rank].exit_text is None
            and not member.closing
        ]

    @property
    def reports(self):
        return [report for reporter in self.reporters for report in reporter.reports]

    def close(self):
        for member in self.members:
            member.selector.close()


@pytest.fixture
def ranks(tmp_path, clock):
    created = []

    def create(size=3, **options):
        created.append(Ranks(size, tmp_path, clock, **options))
        return created[-1]

    yield create
    for group in created:
        group.close()


def test_no_report_while_any_rank_makes_progress(ranks):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
    for _ in range(30):
        run.advance(seconds=10)
        run.activities[2].set("saving")
    assert run.reports == []
    assert run.reporters[1].dumped == []
    run.advance(seconds=120)
    (stall,) = run.reports
    assert "all ranks are waiting for rank" in stall.text


def test_blocking_rank_is_reported_once_and_all_exit(ranks):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
        activity.enter_collective("all-reduce", WorldGroup(range(3), "data"))
    run.activities[1].leave_collective()
    run.activities[1].set("loading data")
    run.advance(seconds=98)
    assert run.reports == []
    run.advance(seconds=4)
    (stall,) = run.reports
    assert (stall.kind, stall.rank) == ("stall", 0)
    first, *others, last = stall.text.splitlines()
    assert first.startswith("training is stalled: no rank has made progress for 10")
    assert f"all ranks are waiting for rank 1 ({current_process()}), which has been in" in first
    assert "which has been in step 4, loading data for 10" in first
    assert [line.rpartition(" for ")[0] for line in others] == [
        f"  rank {rank}: step 4, all-reduce data (beginning the step)," for rank in (0, 2)
    ]
    assert last == f"Python stacks of the ranks: {run.reporters[0].folder / 'stack_traces'}"
    assert [reporter.exit_text for reporter in run.reporters] == [stall.text] * 3
    assert [len(reporter.dumped) for reporter in run.reporters] == [1, 1, 1]


@pytest.mark.parametrize("frozen", [1, 2])
def test_silent_rank_is_reported(ranks, frozen):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
    run.frozen = {frozen}
    run.advance(seconds=105)
    assert run.reports == []  # a rank of a busy machine has some seconds to answer
    run.advance(seconds=15)
    (stall,) = run.reports
    assert (
        f"all ranks are waiting for rank {frozen} ({current_process()}), which does not answer"
        in stall.text
    )
    assert stall.text.endswith(" (of the ranks that answered)")
    assert (
        "rank 0: step 4, beginning the step, for 11" in stall.text
    )  # the state now, not at the time of the query


def test_rank_stopped_for_a_while_does_not_end_the_run(ranks):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
    run.frozen = {1}
    run.advance(seconds=108)  # all are asked, and rank 1 does not answer
    run.frozen = set()
    run.advance(seconds=30)
    assert run.reports == []
    run.advance(seconds=100)
    assert len(run.reports) == 1


def test_frozen_rank_0_is_reported_by_rank_1(ranks):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
    run.frozen = {0}
    run.advance(seconds=125)
    assert [len(reporter.reports) for reporter in run.reporters] == [0, 1, 0]
    assert "all ranks are waiting for rank 0" in run.reporters[1].reports[0].text
    assert None not in (run.reporters[1].exit_text, run.reporters[2].exit_text)


@pytest.mark.parametrize("condition", ["frozen", "killed"])
def test_one_rank_reports_a_lost_rank_0(ranks, condition):
    run = ranks(size=4)
    run.clock.sleep = lambda seconds: None  # one sleeping rank would advance the clock of all
    for rank, (reporter, activity) in enumerate(zip(run.reporters, run.activities, strict=True)):
        reporter.env = RankEnv(rank, 4, rank % 2, 2, "127.0.0.1", 1)
        activity.begin_step(4)
    run.frozen = {0}
    if condition == "killed":
        for connection in run.members[0]._connections.values():
            connection.close()
    run.advance(seconds=125)
    (report,) = run.reports
    assert isinstance(report, RankExit) == (condition == "killed")
    assert None not in [reporter.exit_text for reporter in run.reporters[1:]]
    if condition == "frozen":  # it continues and finds no other rank
        run.frozen = set()
        for member in run.members[1:]:
            member._connection.close()
        run.advance(seconds=5)
        assert run.reporters[0].exit_text is not None
        assert run.reports == [report]


def test_one_claim_per_start(tmp_path):
    assert [claim_reporter(tmp_path, token) for token in ("a", "a", "b", "a")] == [
        True,
        False,
        True,
        False,
    ]
    clear_claims(tmp_path)
    assert list((tmp_path / "logs").iterdir()) == []
    (tmp_path / "file").touch()
    assert claim_reporter(tmp_path / "file", "a"), "without the folder every rank reports"


def test_cpu_time_is_progress_in_open_ended_phases_only(clock):
    activity = RankActivity()
    activity.set_phase("loading the checkpoint")
    progress = ProgressMonitor(activity)
    for _ in range(100):
        clock.now, clock.cpu = clock.now + 1, clock.cpu + 0.2
        progress.seconds_since_progress()
    assert progress.seconds_since_progress() == 0
    activity.begin_step(1)  # in a step only activities count: a spinning rank makes no progress
    progress.seconds_since_progress()
    for _ in range(100):
        clock.now, clock.cpu = clock.now + 1, clock.cpu + 0.2
        progress.seconds_since_progress()
    assert progress.seconds_since_progress() == 100
    activity.set_phase("saving")
    activity.enter_collective("all-gather", WorldGroup(range(3)))
    progress.seconds_since_progress()
    for _ in range(100):
        clock.now, clock.cpu = clock.now + 1, clock.cpu + 0.2
        progress.seconds_since_progress()
    assert progress.seconds_since_progress() == 100


def test_stopped_process_reports_no_stall(clock):
    activity = RankActivity()
    activity.begin_step(1)
    progress = ProgressMonitor(activity)
    clock.now += 1000
    assert progress.seconds_since_progress() == 0


def test_hang_timeout_0_disables_stall_detection(ranks):
    run = ranks(hang_timeout=0.0)
    for activity in run.activities:
        activity.begin_step(4)
    run.advance(seconds=300)
    assert run.reports == []


def test_cause_of_several_failures_is_reported(ranks):
    run = ranks()
    lost = FailureReport(1, "lost", "Connection closed by peer", 1000.0)
    run.members[1]._connection.send({"kind": "failed", "report": lost._asdict()})
    run.advance(seconds=1)
    assert run.reports == []
    cause = FailureReport(2, "error", "Traceback: the cause", 1000.5)
    run.members[2]._connection.send({"kind": "failed", "report": cause._asdict()})
    run.advance()
    assert run.reports == [cause]
    assert [reporter.exit_text for reporter in run.reporters] == [cause.text] * 3


def test_lost_connection_is_reported_without_other_cause(ranks):
    run = ranks()
    lost = FailureReport(1, "lost", "Connection closed by peer", 1000.0)
    run.members[1]._connection.send({"kind": "failed", "report": lost._asdict()})
    run.advance(seconds=3)
    assert run.reports == [lost]


def test_connection_closed_without_bye_is_a_dead_rank(ranks):
    run = ranks()
    run.members[1].disconnect()
    run.frozen = {1}
    run.advance(seconds=5)
    assert run.reports == []
    run.members[2]._connection.close()
    run.frozen = {1, 2}
    run.advance(seconds=2)
    (exited,) = run.reports
    assert isinstance(exited, RankExit)
    assert (exited.rank, exited.process) == (2, str(current_process()))


def test_peers_continue_after_rank_0_has_finished(ranks):
    run = ranks()
    run.members[0].disconnect()
    run.frozen = {0}
    run.advance(seconds=2)
    assert [member.closing for member in run.members[1:]] == [True, True]
    assert run.reports == []


def test_connection_without_token_is_refused(ranks):
    run = ranks(token="another")
    run.activities[0].begin_step(4)
    run.advance(seconds=3)
    assert run.members[0]._connections == {}


def test_rank_that_never_connected_is_reported(ranks, clock):
    run = ranks(size=3)
    run.members[0].world_size = 4
    for activity in run.activities:
        activity.begin_step(4)
    run.advance(seconds=120)
    assert "all ranks are waiting for rank 3, which never connected" in run.reports[0].text
