"""Schedules for given times: always legal, and as fast as named schedules or faster."""

import random

import pytest

from megatrain.pipeline.schedule import Placement
from megatrain.pipeline.schedules import build_schedule
from megatrain.pipeline.simulator import Times, even_times, simulate
from megatrain.pipeline.verify import check_schedule
from megatrain.planner.list_scheduler import SchedulingRules, list_schedule


def test_schedule_of_the_docstring():
    """Stage 1 is twice as slow."""
    times = Times([1, 2], [1, 2], [1, 2])
    schedule = list_schedule(Placement(2), 2, times, SchedulingRules(max_microbatches=2))
    assert [" ".join(map(str, actions)) for actions in schedule.actions] == [
        "F0 F1 I0 W0 I1 W1",
        "F0 I0 F1 I1 W0 W1",
    ]
    assert [
        [(span.start, span.end) for span in spans] for spans in simulate(schedule, times).spans
    ] == [
        [(0, 1), (1, 2), (5, 6), (6, 7), (9, 10), (10, 11)],
        [(1, 3), (3, 5), (5, 7), (7, 9), (9, 11), (11, 13)],
    ]


@pytest.mark.parametrize("seed", range(8))
def test_legal_and_within_limits_for_random_times(seed):
    """The checker accepts the order, and the simulator confirms the times."""
    numbers = random.Random(seed)
    for _ in range(40):
        placement = Placement(
            numbers.randint(1, 5), numbers.choice([1, 2, 3]), numbers.choice(["loop", "v"])
        )
        microbatches = numbers.randint(1, 9)
        rules = SchedulingRules(
            numbers.randint(1, 6), numbers.random() < 0.7, numbers.random() < 0.5
        )
        some = [
            [
                numbers.choice([0, 0.1, 1, 3]) * numbers.uniform(0.5, 1)
                for _ in range(placement.stages)
            ]
            for _ in range(3)
        ]
        schedule = list_schedule(
            placement, microbatches, Times(*some, send=numbers.choice([0, 0.1, 2])), rules
        )
        peaks = check_schedule(schedule, microbatches)
        assert max(peaks) <= rules.max_microbatches * placement.chunks
        assert {action.kind for actions in schedule.actions for action in actions} == set(
            "FIW" if rules.split else "FB"
        )


@pytest.mark.parametrize(
    ("placement", "name"),
    [(Placement(4), "1f1b"), (Placement(4, 2), "interleaved"), (Placement(4, 2, "v"), "zb-v")],
)
def test_even_stages_as_fast_as_named_schedules(placement, name):
    times = even_times(placement, forward=1, input_gradient=1, weight_gradient=1)
    made = simulate(list_schedule(placement, 8, times, SchedulingRules(max_microbatches=4)), times)
    named = simulate(build_schedule(name, 4, 8, placement.chunks), times)
    assert made.makespan <= named.makespan
    assert max(made.peak_activations) <= max(*named.peak_activations, 4 * placement.chunks)


def test_uneven_stages_faster_than_named_schedules():
    placement = Placement(4, 2, "v")
    stages = [1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0]
    times = Times(
        stages, [1.2 * stage for stage in stages], [0.6 * stage for stage in stages], send=0.2
    )
    made, named = (
        simulate(schedule, times)
        for schedule in (
            list_schedule(placement, 8, times, SchedulingRules(max_microbatches=4)),
            build_schedule("zb-v", 4, 8),
        )
    )
    assert made.makespan < 0.93 * named.makespan
    assert max(made.peak_activations) <= max(named.peak_activations)


def test_look_ahead_defers_weight_gradients():
    """Rank 1 has W1 pending and F2 about to arrive. F2 first lets rank 0 start I2 earlier."""
    times = Times([3, 4], [3, 3], [3, 3], send=1)
    eager, patient = (
        list_schedule(Placement(2), 3, times, SchedulingRules(2, look_ahead=look_ahead))
        for look_ahead in (False, True)
    )
    assert " ".join(map(str, eager.actions[1])) == "F0 I0 F1 I1 W0 W1 F2 I2 W2"
    assert " ".join(map(str, patient.actions[1])) == "F0 I0 F1 I1 W0 F2 I2 W1 W2"
    assert (simulate(eager, times).makespan, simulate(patient, times).makespan) == (38, 36)
