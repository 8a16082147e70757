"""Derived sends and receives, and the proof: legal schedules run, others are errors."""

import graphlib
import queue
import random
import threading

import pytest

from megatrain.pipeline.communication import add_communication
from megatrain.pipeline.schedule import (
    Action,
    Message,
    P2POp,
    Placement,
    Schedule,
    peak_activations,
)
from megatrain.pipeline.schedules import SCHEDULES, build_schedule
from megatrain.pipeline.verify import ScheduleError, check_instructions, check_schedule

SIZES = [(1, 3, None), (2, 4, None), (3, 7, None), (4, 8, None)]


def schedules():
    for name in SCHEDULES:
        for ranks, microbatches, chunks in [
            *SIZES,
            *([(2, 5, 3), (3, 3, 4)] if name == "interleaved" else []),
        ]:
            yield build_schedule(name, ranks, microbatches, chunks), microbatches


def named(case):
    return f"{case[0].name}-{len(case[0].actions)}-{case[1]}"


def changed(schedule, rank, actions):
    lists = [list(of_rank) for of_rank in schedule.actions]
    lists[rank] = actions
    return Schedule(schedule.name, schedule.placement, lists, schedule.peaks)


def swapped(actions, first, second):
    actions = list(actions)
    actions[first], actions[second] = actions[second], actions[first]
    return actions


def can_run(schedule):
    """Returns True for legal schedules, independently of `check_schedule`.

    The graph of program order, messages and F before I before W must have no cycle.
    """
    before = {}
    for rank, actions in enumerate(schedule.actions):
        for index, action in enumerate(actions):
            needs = before.setdefault((rank, action), set())
            if index:
                needs.add((rank, actions[index - 1]))
            stage = schedule.placement.stage(rank, action.chunk)
            if action.kind == "F" and stage:
                place = schedule.placement.location(stage - 1)
                needs.add((place.rank, action._replace(chunk=place.chunk)))
            if action.kind in "BI":
                needs.add((rank, action._replace(kind="F")))
                if stage + 1 < schedule.placement.stages:
                    place = schedule.placement.location(stage + 1)
                    theirs = [
                        a
                        for a in schedule.actions[place.rank]
                        if a.kind in "BI" and a[1:] == (action.microbatch, place.chunk)
                    ]
                    needs.add((place.rank, theirs[0]))
            if action.kind == "W":
                needs.add((rank, action._replace(kind="I")))
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError:
        return False
    return all(
        peak_activations(actions) <= most
        for actions, most in zip(schedule.actions, schedule.peaks, strict=True)
    )


# -- transfers -----------------------------------------------------------------------------------


def test_transfers_of_1f1b_as_drawn():
    assert [
        " ".join(str(i) for i in rank) for rank in add_communication(build_schedule("1f1b", 2, 2))
    ] == [
        "F0 send F0 to rank 1 receive B0 from rank 1 F1 send F1 to rank 1 receive B1 from rank 1 "
        "B0 B1",
        "receive F0 from rank 0 F0 receive F1 from rank 0 B0 send B0 to rank 0 F1 B1 "
        "send B1 to rank 0",
    ]


def test_at_the_turning_point_of_a_v_messages_are_local():
    v = build_schedule("zb-v", 2, 3)
    first, last = add_communication(v)
    assert {
        (t.message.payload, t.message.chunk)
        for t in last
        if isinstance(t, P2POp) and t.direction == "local"
    } == {
        ("F", 1),
        ("B", 0),
    }
    assert not [t for t in first if isinstance(t, P2POp) and t.direction == "local"]
    assert last[last.index(Action("F", 0)) + 1] == P2POp("local", Message("F", 0, 1), 1)


@pytest.mark.parametrize("case", schedules(), ids=named)
def test_a_receive_is_posted_before_the_action_that_precedes_its_use(case):
    schedule, _ = case
    for instructions in add_communication(schedule):
        computing = [i for i in instructions if isinstance(i, Action)]
        done = 0
        for instruction in instructions:
            if isinstance(instruction, Action):
                done += 1
            elif instruction.direction == "receive":
                kinds = "F" if instruction.message.payload == "F" else "BI"
                use = next(
                    n
                    for n, a in enumerate(computing)
                    if a.kind in kinds and a[1:] == instruction.message[1:]
                )
                assert done <= max(use - 1, 0)


def run_on_threads(schedule, microbatches):
    """Runs instructions on threads with blocking queues; tensors are lists of computations."""
    ranks, placement = schedule.placement.ranks, schedule.placement
    channels = {(a, b): queue.Queue() for a in range(ranks) for b in range(ranks)}
    ends, failures = {}, []

    def work(rank, instructions):
        posted, available = {}, {}
        made = None
        try:
            for i in instructions:
                if isinstance(i, Action):
                    key = Message("F" if i.kind == "F" else "B", i.microbatch, i.chunk)
                    source = placement.producer(rank, i)
                    while source and source.rank != rank and key not in available:
                        available[posted[source.rank].pop(0)] = channels[source.rank, rank].get(
                            timeout=200
                        )
                    made = [
                        *(available.pop(key) if source else []),
                        (key[0], placement.stage(rank, i.chunk), i.microbatch),
                    ]
                    if i.kind != "W" and placement.consumer(rank, i) is None:
                        ends[key[0], i.microbatch] = made
                elif i.direction == "receive":
                    posted.setdefault(i.peer, []).append(i.message)
                elif i.direction == "local":
                    available[i.message] = made
                else:
                    channels[rank, i.peer].put(made)
        except Exception as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in enumerate(add_communication(schedule))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stages = range(placement.stages)
    for m in range(microbatches):
        assert ends["F", m] == [("F", stage, m) for stage in stages]
        assert ends["B", m] == [("B", stage, m) for stage in reversed(stages)]


@pytest.mark.parametrize("case", schedules(), ids=named)
def test_legal_schedules_run_with_blocking_channels_through_each_stage_in_order(case):
    run_on_threads(*case)


def test_a_receiver_can_consume_in_another_order_than_the_sender():
    """Rank 0 sends F0 F1 F2, rank 1 consumes F2 first: all are posted in the sender's order."""
    forwards = [Action("F", i) for i in range(3)]
    backwards = [Action("B", i) for i in range(3)]
    schedule = Schedule(
        "reversed", Placement(2), [forwards + backwards, forwards[::-1] + backwards], [3, 3]
    )
    assert [op.message.microbatch for op in add_communication(schedule)[1][:3]] == [0, 1, 2]
    check_schedule(schedule, 3)
    run_on_threads(schedule, 3)


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", schedules(), ids=named)
def test_a_dropped_action_is_named(case):
    schedule, microbatches = case
    for rank, actions in enumerate(schedule.actions):
        for index, action in enumerate(actions):
            # If one part of a split backward is missing, the other part identifies it.
            with pytest.raises(ScheduleError, match=rf"rank {rank}: missing {action}$"):
                check_schedule(
                    changed(schedule, rank, actions[:index] + actions[index + 1 :]), microbatches
                )


@pytest.mark.parametrize("case", schedules(), ids=named)
def test_a_duplicated_action_is_named(case):
    schedule, microbatches = case
    for rank, actions in enumerate(schedule.actions):
        for index, action in enumerate(actions):
            with pytest.raises(ScheduleError, match=f"rank {rank}: {action} occurs 2 times"):
                check_schedule(
                    changed(schedule, rank, [*actions[:index], action, *actions[index:]]),
                    microbatches,
                )


@pytest.mark.parametrize("case", schedules(), ids=named)
def test_a_swap_passes_only_where_it_can_run_in_the_declared_memory(case):
    schedule, microbatches = case
    chance = random.Random(named(case))
    verdicts = set()
    for _ in range(150):
        rank = chance.randrange(len(schedule.actions))
        mutant = changed(
            schedule,
            rank,
            swapped(schedule.actions[rank], *chance.sample(range(len(schedule.actions[rank])), 2)),
        )
        try:
            check_schedule(mutant, microbatches)
            passed = True
        except ScheduleError as error:
            passed, message = False, str(error)
        assert passed == can_run(mutant)
        assert passed or any(
            text in message for text in ("precedes", "deadlock", "declared at most")
        )
        verdicts.add(passed)
    assert False in verdicts


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([["B0", "F0"]], "rank 0: B0 precedes F0"),
        ([["F0", "W0", "I0"]], "rank 0: W0 precedes I0"),
        ([["F0", "I0"]], "rank 0: missing W0"),
        ([["F0", "B0", "W0"]], "rank 0: missing I0; unexpected B0"),
        ([["F0", "B0", "F1"]], "rank 0: unexpected F1"),
        ([["F0", "B0"], ["F0", "B0"]], "actions for 2 ranks; expected 1"),
    ],
)
def test_messages(actions, message):
    made = [[Action(word[0], int(word[1:])) for word in words] for words in actions]
    with pytest.raises(ScheduleError) as error:
        check_schedule(Schedule("", Placement(1), made, [9] * len(made)), 1)
    assert str(error.value) == message


def test_a_deadlock_names_the_blocked_ranks():
    a, b = Action("F", 0), Action("F", 1)
    back = [Action("B", 0), Action("B", 1)]
    crossed = Schedule("", Placement(2), [[a, back[0], b, back[1]], [b, a, *back]], [9, 9])
    with pytest.raises(
        ScheduleError, match="deadlock: rank 0 is blocked on B0, rank 1 is blocked on F1"
    ):
        check_schedule(crossed, 2)


def test_more_activations_than_declared():
    schedule = build_schedule("gpipe", 2, 4)
    with pytest.raises(ScheduleError, match="rank 0: holds 4 activations, declared at most 3"):
        check_schedule(Schedule("", schedule.placement, schedule.actions, [3, 4]), 4)


def test_activations_are_held_until_w():
    assert (
        peak_activations(
            [
                Action("F", 0),
                Action("I", 0),
                Action("F", 1),
                Action("W", 0),
                Action("I", 1),
                Action("W", 1),
            ]
        )
        == 2
    )
    assert peak_activations([Action("F", 0), Action("B", 0), Action("F", 1), Action("B", 1)]) == 1


def mutate_instructions(kind, direction):
    schedule = build_schedule("interleaved", 2, 4)
    lists = add_communication(schedule)
    where = [
        i
        for i, step in enumerate(lists[1])
        if isinstance(step, P2POp) and step.direction == direction
    ]
    if kind == "drop":
        del lists[1][where[2]]
    elif kind == "duplicate":
        lists[1].insert(where[2], lists[1][where[2]])
    else:
        lists[1] = swapped(lists[1], where[1], where[2])
    return lists, schedule.placement


@pytest.mark.parametrize(
    ("kind", "direction", "message"),
    [
        ("drop", "receive", "deadlock: .* rank 1 is blocked on F0.1"),
        ("drop", "send", "arrives"),
        ("duplicate", "receive", "arrives"),
        ("duplicate", "send", "arrives"),
        ("swap", "receive", "rank 1: expects F0.1 from rank 0, but F1 arrives"),
        ("swap", "send", "arrives"),
    ],
)
def test_wrong_transfers_are_errors(kind, direction, message):
    lists, placement = mutate_instructions(kind, direction)
    with pytest.raises(ScheduleError, match=message):
        check_instructions(lists, placement)


def test_a_local_message_that_is_missing_or_unused():
    schedule = build_schedule("zb-v", 1, 1)
    lists = add_communication(schedule)
    keep = next(step for step in lists[0] if isinstance(step, P2POp))
    with pytest.raises(ScheduleError, match=r"is blocked on F0\.1"):
        check_instructions([[step for step in lists[0] if step != keep]], schedule.placement)
    with pytest.raises(ScheduleError, match=r"rank 0: F0\.1 is never used"):
        check_instructions([[*lists[0], keep]], schedule.placement)


def test_a_message_that_is_never_received():
    schedule = build_schedule("1f1b", 2, 1)
    lists = add_communication(schedule)
    lists[0].append(P2POp("send", Message("F", 7, 0), 1))
    with pytest.raises(ScheduleError, match="rank 1 never receives F7 from rank 0"):
        check_instructions(lists, schedule.placement)
