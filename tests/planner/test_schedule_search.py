"""The search behind `parallel.schedule: auto`, on models whose times and sizes are made up."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest

from megatrain.pipeline.schedule import Action, Placement, Schedule
from megatrain.pipeline.schedules import SCHEDULES, build_schedule
from megatrain.pipeline.simulator import Times, simulate
from megatrain.pipeline.verify import check_schedule
from megatrain.planner.cost_model import cost_model, cut_of
from megatrain.planner.schedule_search import (
    EvenCosts,
    LayerBytes,
    MeasuredCosts,
    candidate_of,
    find_candidates,
    peak_memory,
)
from megatrain.telemetry.bubble_analysis import PipelineTimes

EVEN = EvenCosts(1, 1, 1, 0)


@dataclass
class Truth:
    """What layers take on ranks, in seconds, and what an action takes beside them."""

    forward: list[float]
    input_gradient: list[float]
    weight_gradient: list[float]
    slowness: list[float]
    beside: float = 0.1
    send: float = 0.05

    def times(self, placement, counts):
        cut = cut_of(counts)

        def of(layers, beside):
            return [
                beside
                + self.slowness[placement.location(stage).rank]
                * sum(layers[layer] for layer in cut[stage])
                for stage in range(len(cut))
            ]

        return Times(
            of(self.forward, self.beside),
            of(self.input_gradient, self.beside),
            of(self.weight_gradient, 0.0),
            self.send,
        )

    def measured(self, counts):
        """As the tracer would see it under 1F1B and ZB-H1: no mark for the embedding's backward, none within W."""
        placement, cut = Placement(len(counts)), cut_of(counts)
        times = self.times(placement, counts)
        kinds = {
            (kind, stage): times.duration(Action(kind, 0), stage)
            for kind in "FBIW"
            for stage in range(len(counts))
        }
        layers = {}
        for stage, places in enumerate(cut):
            for layer in places:
                slow = self.slowness[stage]
                layers["F", layer] = slow * self.forward[layer]
                if layer:
                    layers["I", layer] = slow * self.input_gradient[layer]
                    layers["B", layer] = slow * (
                        self.input_gradient[layer] + self.weight_gradient[layer]
                    )
        titles = ["embedding", *(f"block {number}" for number in range(sum(counts))), "head"]
        return PipelineTimes(
            build_schedule("1f1b", len(counts), 8), titles, cut, kinds, layers, 1.0, self.send
        )


def truth(seed, blocks, ranks):
    """Blocks of like shape, two of them slow, a head unlike them, one slow rank; the embedding's gradient is never put off."""
    numbers = random.Random(seed)
    factors = [1.0] * blocks
    for slow in numbers.sample(range(blocks), 2):
        factors[slow] = numbers.uniform(2, 4)
    slowness = [1.0] * ranks
    slowness[numbers.randrange(ranks)] = 1.0 if seed % 2 else 1.3
    return Truth(
        [0.3, *factors, 1.2],
        [0.7, *factors, 1.5],
        [0.0, *(0.8 * factor for factor in factors), 0.5],
        slowness,
    )


def costs(model, counts, sizes=None):
    layers = sum(counts) + 2
    return MeasuredCosts(
        cost_model(model.measured(counts)), sizes or LayerBytes([1.0] * layers, [1.0] * layers)
    )


# -- what is predicted -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_from_one_cut_and_placement_all_others_are_predicted(seed):
    model = truth(seed, 12, 3)
    known = costs(model, (4, 4, 4))
    for placement, counts in [
        (Placement(3), (2, 7, 3)),
        (Placement(3, 2, "v"), (1, 2, 3, 1, 4, 1)),
        (Placement(3, 2), (2, 2, 2, 2, 2, 2)),
    ]:
        predicted, true = known.times(placement, counts), model.times(placement, counts)
        for stage, kind in itertools.product(range(placement.stages), "FBIW"):
            assert predicted.duration(Action(kind, 0), stage) == pytest.approx(
                true.duration(Action(kind, 0), stage)
            ), (kind, stage)


def test_memory_by_hand():
    """1F1B on 2 ranks holds 2 microbatches on the first and 1 on the second; a V's first rank has the head too."""
    sizes = LayerBytes([100, 10, 10, 10, 10, 200], [1, 2, 2, 2, 2, 5])
    known = costs(truth(0, 4, 2), (2, 2), sizes)
    assert known.memory(build_schedule("1f1b", 2, 4), (3, 1)) == [130 + 2 * 7, 210 + 7]
    v = Schedule(
        "",
        Placement(2, 2, "v"),
        [
            [
                Action("F", 0),
                Action("F", 0, 1),
                Action("I", 0, 1),
                Action("I", 0),
                Action("W", 0, 1),
                Action("W", 0),
            ],
            [Action("F", 0), Action("F", 0, 1), Action("B", 0, 1), Action("B", 0)],
        ],
        [2, 2],
    )
    assert known.memory(v, (1, 1, 1, 1)) == [110 + 210 + 3 + 7, 20 + 4]
    assert peak_memory(build_schedule("gpipe", 2, 4), 0, [3.0, 1.0]) == 12


# -- what is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "microbatches", "fastest"),
    [(2, 4, "zb-v"), (4, 8, "zb-v"), (4, 4, "list"), (1, 4, "1f1b")],
)
def test_on_even_stages(ranks, microbatches, fastest):
    plans = find_candidates(EVEN, ranks=ranks, microbatches=microbatches, limit=ranks + 1e-6)
    assert plans[0].schedule.name == fastest
    assert plans[0].seconds <= 1.01 * min(plan.seconds for plan in plans)
    if ranks > 1:
        assert (
            plans[0].seconds
            < 0.85
            * candidate_of(EVEN, build_schedule("1f1b", ranks, microbatches), (1,) * ranks).seconds
        )


@pytest.mark.parametrize("seed", range(4))
def test_on_uneven_stages_every_plan_is_legal_and_takes_what_it_says(seed):
    """And none of all cuts under 1F1B is faster than the plan found, which the true times confirm."""
    model = truth(seed, 8, 2)
    plans = find_candidates(costs(model, (4, 4)), ranks=2, microbatches=6)
    assert {plan.schedule.name for plan in plans} == {*SCHEDULES, "list"} - {"gpipe"}
    for plan in plans:
        check_schedule(plan.schedule, 6)
        assert sum(plan.counts) == 8
        assert simulate(
            plan.schedule, model.times(plan.schedule.placement, plan.counts)
        ).makespan == pytest.approx(plan.seconds)
    one_f_one_b = build_schedule("1f1b", 2, 6)
    every = [
        simulate(one_f_one_b, model.times(Placement(2), (first, 8 - first))).makespan
        for first in range(1, 8)
    ]
    best = next(plan for plan in plans if plan.schedule.name == "1f1b")
    assert best.seconds == pytest.approx(min(every), rel=0.01)
    assert plans[0].seconds < 0.95 * min(every)


def test_more_stages_than_blocks_are_left_out():
    plans = find_candidates(costs(truth(0, 3, 2), (2, 1)), ranks=2, microbatches=4)
    assert plans
    assert {plan.schedule.placement for plan in plans} == {Placement(2)}


# -- memory ----------------------------------------------------------------------------------------


def test_no_plan_is_over_the_limit():
    """The less memory, the slower the best plan, until there is none."""
    known = costs(truth(1, 8, 2), (4, 4), LayerBytes([5.0] * 10, [1.0] * 10))
    needs, seconds = [], []
    limit = math.inf
    while plans := find_candidates(known, ranks=2, microbatches=6, limit=limit):
        assert all(max(plan.memory) <= limit for plan in plans)
        needs.append(max(plans[0].memory))
        seconds.append(min(plan.seconds for plan in plans))
        limit = needs[-1] - 1e-6
    assert len(needs) >= 2
    assert seconds == sorted(seconds)
    # Five of the ten layers a rank at least, one microbatch at a time.
    assert limit >= 5 * 5 + 5 - 1


def test_of_equally_fast_plans_the_one_that_holds_least():
    """Without a bubble to fill, twice the activations gain nothing."""
    plans = find_candidates(EvenCosts(1, 1, 1, 0), ranks=2, microbatches=40)
    equal = [plan for plan in plans if plan.seconds <= 1.01 * min(other.seconds for other in plans)]
    assert len(equal) > 2
    assert max(plans[0].memory) == min(max(plan.memory) for plan in equal)
