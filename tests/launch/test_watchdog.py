"""Rank 0's watchdog and others', connected to each other, with a clock and a way to speak that the test holds."""

import contextlib
import select

import pytest

from megatrain.distributed.activity import RankActivity, WorldGroup
from megatrain.distributed.env import RankEnv
from megatrain.launch import progress_monitor, watchdog_coordinator, watchdog_peer, watchdog_thread
from megatrain.launch.failure_reporter import claim_reporter, clear_claims, current_process
from megatrain.launch.failures import FailureReport, RankExit
from megatrain.launch.progress_monitor import ProgressMonitor
from megatrain.launch.transport import connect, listen
from megatrain.launch.watchdog_coordinator import WatchdogCoordinator
from megatrain.launch.watchdog_peer import WatchdogPeer


class Clock:
    """Stands still until the test moves it. `cpu` is what the process has computed, in seconds."""

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
    monkeypatch.setattr(watchdog_thread, "LOOK_SECONDS", 0.0)
    for module in (watchdog_coordinator, watchdog_peer, progress_monitor):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(
        progress_monitor.resource, "getrusage", lambda who: type("Usage", (), {"ru_majflt": 0})
    )
    return clock


class Left(Exception):
    """In place of the end of a process."""


class Voice:
    """Writes down what is said."""

    def __init__(self, rank, world_size, folder):
        self.place, self.folder = (
            RankEnv(rank, world_size, rank, world_size, "127.0.0.1", 1),
            folder,
        )
        self.said, self.dumped, self.left, self.is_supervised = [], [], None, False

    def say(self, failure, *, step=None):
        self.said.append(failure)
        return failure.text if isinstance(failure, FailureReport) else f"death of {failure.rank}"

    def dump(self, state):
        self.dumped.append(state.words)

    def leave(self, text):
        self.left = text
        raise Left


class Ranks:
    """`size` watchdogs in this process; no thread of theirs runs, the test has them look."""

    def __init__(self, size, folder, clock, *, hang_timeout=100.0, token="token"):
        self.clock, self.activities = clock, [RankActivity() for _ in range(size)]
        self.voices = [Voice(rank, size, folder) for rank in range(size)]
        listener = listen("127.0.0.1", peers=size)
        self.members = [
            WatchdogCoordinator(
                self.activities[0],
                self.voices[0],
                listener,
                token="token",
                hang_timeout=hang_timeout,
            )
        ]
        for rank in range(1, size):
            wire = connect("127.0.0.1", listener.getsockname()[1])
            self.members.append(
                WatchdogPeer(
                    self.activities[rank],
                    self.voices[rank],
                    wire,
                    token=token,
                    hub=current_process(),
                    hang_timeout=hang_timeout,
                )
            )
        self.frozen = set()
        self.look()

    def look(self, seconds=0.0):
        """After so many seconds, second by second as threads look; until nothing more arrives where there are answers to arrive."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + 1)
            self._turn()
            if self.members[0]._question is not None:
                self._settle()
        self._turn()
        self._settle()

    def _settle(self):
        """What is sent to this machine is there at once, or nearly: all may turn until none has heard anything for a moment."""
        for _ in range(1000):
            if not select.select([member.selector for member in self._awake()], [], [], 0.03)[0]:
                return
            self._turn()
        raise AssertionError("they never stop talking")

    def _turn(self):
        for member in self._awake():
            with contextlib.suppress(Left):
                member.turn()

    def _awake(self):
        return [
            member
            for rank, member in enumerate(self.members)
            if rank not in self.frozen and self.voices[rank].left is None and not member.closing
        ]

    @property
    def said(self):
        return [what for voice in self.voices for what in voice.said]

    def close(self):
        for member in self.members:
            member.selector.close()


@pytest.fixture
def ranks(tmp_path, clock):
    made = []

    def make(size=3, **more):
        made.append(Ranks(size, tmp_path, clock, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_nothing_is_said_while_any_rank_gets_on(ranks):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
    for _ in range(30):
        run.look(seconds=10)
        run.activities[2].set("saving")
    assert run.said == []
    assert run.voices[1].dumped == []
    run.look(seconds=120)
    (stall,) = run.said
    assert "everyone waits for rank" in stall.text


def test_the_rank_that_all_wait_for_is_named_once_and_all_leave(ranks):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
        activity.enter_collective("all-reduce", WorldGroup(range(3), "data"))
    run.activities[1].leave_collective()
    run.activities[1].set("loading data")
    run.look(seconds=98)
    assert run.said == []
    run.look(seconds=4)
    (stall,) = run.said
    assert (stall.kind, stall.rank) == ("stall", 0)
    first, *others, last = stall.text.splitlines()
    assert first.startswith("the run stands still: nothing has moved for 10")
    assert (
        f"everyone waits for rank 1 ({current_process()}), which has been in step 4, loading data for 10"
        in first
    )
    assert [line.rpartition(" for ")[0] for line in others] == [
        f"  rank {rank}: step 4, all-reduce data (beginning the step)," for rank in (0, 2)
    ]
    assert last == f"the ranks' Python stacks are in {run.voices[0].folder / 'stacks'}"
    assert [voice.left for voice in run.voices] == [stall.text] * 3
    assert [len(voice.dumped) for voice in run.voices] == [1, 1, 1]


@pytest.mark.parametrize("frozen", [1, 2])
def test_a_rank_that_does_not_answer_is_named(ranks, frozen):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
    run.frozen = {frozen}
    run.look(seconds=105)
    assert run.said == []  # a busy machine's rank has some seconds to answer
    run.look(seconds=15)
    (stall,) = run.said
    assert (
        f"everyone waits for rank {frozen} ({current_process()}), which does not answer"
        in stall.text
    )
    assert stall.text.endswith(", but for who does not answer")
    assert (
        "rank 0: step 4, beginning the step, for 11" in stall.text
    )  # as it is now, not as it was when it was asked


def test_a_rank_that_was_stopped_for_a_while_ends_nothing(ranks):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
    run.frozen = {1}
    run.look(seconds=108)  # all are asked, and it does not answer
    run.frozen = set()
    run.look(seconds=30)
    assert run.said == []
    run.look(seconds=100)
    assert len(run.said) == 1


def test_a_frozen_rank_0_is_named_by_rank_1(ranks):
    run = ranks()
    for activity in run.activities:
        activity.begin_step(4)
    run.frozen = {0}
    run.look(seconds=125)
    assert [len(voice.said) for voice in run.voices] == [0, 1, 0]
    assert "everyone waits for rank 0" in run.voices[1].said[0].text
    assert None not in (run.voices[1].left, run.voices[2].left)


@pytest.mark.parametrize("trouble", ["frozen", "killed"])
def test_of_two_machines_one_rank_speaks_for_a_lost_rank_0(ranks, trouble):
    run = ranks(size=4)
    run.clock.sleep = lambda seconds: None  # of one rank, which would keep all from looking
    for rank, (voice, activity) in enumerate(zip(run.voices, run.activities, strict=True)):
        voice.place = RankEnv(rank, 4, rank % 2, 2, "127.0.0.1", 1)
        activity.begin_step(4)
    run.frozen = {0}
    if trouble == "killed":
        for wire in run.members[0]._wires.values():
            wire.close()
    run.look(seconds=125)
    (said,) = run.said
    assert isinstance(said, RankExit) == (trouble == "killed")
    assert None not in [voice.left for voice in run.voices[1:]]
    if trouble == "frozen":  # it goes on, and finds nobody
        run.frozen = set()
        for member in run.members[1:]:
            member._wire.close()
        run.look(seconds=5)
        assert run.voices[0].left is not None
        assert run.said == [said]


def test_who_speaks_is_settled_once_for_each_start_of_a_run(tmp_path):
    assert [claim_reporter(tmp_path, token) for token in ("a", "a", "b", "a")] == [
        True,
        False,
        True,
        False,
    ]
    clear_claims(tmp_path)
    assert list((tmp_path / "logs").iterdir()) == []
    (tmp_path / "file").touch()
    assert claim_reporter(tmp_path / "file", "a"), (
        "there is no such folder: better twice than not at all"
    )


def test_work_of_unknown_length_is_progress_and_waiting_is_not(clock):
    activity = RankActivity()
    activity.set_phase("loading the checkpoint")
    looks = ProgressMonitor(activity)
    for _ in range(100):
        clock.now, clock.cpu = clock.now + 1, clock.cpu + 0.2
        looks.look()
    assert looks.look() == 0
    activity.begin_step(1)  # in a step only notes count: a rank that spins gets nowhere
    looks.look()
    for _ in range(100):
        clock.now, clock.cpu = clock.now + 1, clock.cpu + 0.2
        looks.look()
    assert looks.look() == 100
    activity.set_phase("saving")
    activity.enter_collective("all-gather", WorldGroup(range(3)))
    looks.look()
    for _ in range(100):
        clock.now, clock.cpu = clock.now + 1, clock.cpu + 0.2
        looks.look()
    assert looks.look() == 100


def test_a_process_that_was_stopped_itself_blames_nobody(clock):
    activity = RankActivity()
    activity.begin_step(1)
    looks = ProgressMonitor(activity)
    clock.now += 1000
    assert looks.look() == 0


def test_hang_timeout_0_waits_for_ever(ranks):
    run = ranks(hang_timeout=0.0)
    for activity in run.activities:
        activity.begin_step(4)
    run.look(seconds=300)
    assert run.said == []


def test_of_several_failures_the_cause_is_said(ranks):
    run = ranks()
    lost = FailureReport(1, "lost", "Connection closed by peer", 1000.0)
    run.members[1]._wire.send({"kind": "failed", "report": lost._asdict()})
    run.look(seconds=1)
    assert run.said == []
    cause = FailureReport(2, "error", "Traceback: the cause", 1000.5)
    run.members[2]._wire.send({"kind": "failed", "report": cause._asdict()})
    run.look()
    assert run.said == [cause]
    assert [voice.left for voice in run.voices] == [cause.text] * 3


def test_a_lost_connection_is_said_when_nothing_else_is_known(ranks):
    run = ranks()
    lost = FailureReport(1, "lost", "Connection closed by peer", 1000.0)
    run.members[1]._wire.send({"kind": "failed", "report": lost._asdict()})
    run.look(seconds=3)
    assert run.said == [lost]


def test_a_rank_that_ends_without_a_goodbye_is_dead_and_one_that_says_it_has_finished(ranks):
    run = ranks()
    run.members[1].part()
    run.frozen = {1}
    run.look(seconds=5)
    assert run.said == []
    run.members[2]._wire.close()
    run.frozen = {1, 2}
    run.look(seconds=2)
    (death,) = run.said
    assert isinstance(death, RankExit)
    assert (death.rank, death.who) == (2, str(current_process()))


def test_once_rank_0_has_finished_the_others_go_on_alone(ranks):
    run = ranks()
    run.members[0].part()
    run.frozen = {0}
    run.look(seconds=2)
    assert [member.closing for member in run.members[1:]] == [True, True]
    assert run.said == []


def test_who_does_not_know_the_token_is_not_listened_to(ranks):
    run = ranks(token="another")
    run.activities[0].begin_step(4)
    run.look(seconds=3)
    assert run.members[0]._wires == {}


def test_a_rank_that_never_came_is_named(ranks, clock):
    run = ranks(size=3)
    run.members[0].world_size = 4
    for activity in run.activities:
        activity.begin_step(4)
    run.look(seconds=120)
    assert "everyone waits for rank 3, which never came" in run.said[0].text
