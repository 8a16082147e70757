"""The search of `parallel.schedule: auto` on models with synthetic times and sizes."""

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
    """True seconds of layers by rank, and the overhead of an action."""

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
        """Returns a trace's times: without the embedding's backward and without layers in W."""
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
    """Returns a model with two slow blocks, another head, and a slow rank for even seeds."""
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


# -- prediction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_one_measured_cut_predicts_all_others(seed):
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
    """1F1B on 2 ranks holds 2 and 1 microbatches; in a V the first rank has the head too."""
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


# -- search ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "microbatches", "fastest"),
    [(2, 4, "zb-v"), (4, 8, "zb-v"), (4, 4, "list"), (1, 4, "1f1b")],
)
def test_on_even_stages(ranks, microbatches, fastest):
    candidates = find_candidates(EVEN, ranks=ranks, microbatches=microbatches, limit=ranks + 1e-6)
    assert candidates[0].schedule.name == fastest
    assert candidates[0].seconds <= 1.01 * min(candidate.seconds for candidate in candidates)
    if ranks > 1:
        assert (
            candidates[0].seconds
            < 0.85
            * candidate_of(EVEN, build_schedule("1f1b", ranks, microbatches), (1,) * ranks).seconds
        )


@pytest.mark.parametrize("seed", range(4))
def test_uneven_stages_have_legal_candidates_with_exact_times(seed):
    """No cut under 1F1B is faster than the best candidate, as the true times confirm."""
    model = truth(seed, 8, 2)
    candidates = find_candidates(costs(model, (4, 4)), ranks=2, microbatches=6)
    assert {candidate.schedule.name for candidate in candidates} == {*SCHEDULES, "list"} - {"gpipe"}
    for candidate in candidates:
        check_schedule(candidate.schedule, 6)
        assert sum(candidate.counts) == 8
        assert simulate(
            candidate.schedule, model.times(candidate.schedule.placement, candidate.counts)
        ).makespan == pytest.approx(candidate.seconds)
    one_f_one_b = build_schedule("1f1b", 2, 6)
    every = [
        simulate(one_f_one_b, model.times(Placement(2), (first, 8 - first))).makespan
        for first in range(1, 8)
    ]
    best = next(candidate for candidate in candidates if candidate.schedule.name == "1f1b")
    assert best.seconds == pytest.approx(min(every), rel=0.01)
    assert candidates[0].seconds < 0.95 * min(every)


def test_placements_with_more_stages_than_blocks_are_skipped():
    candidates = find_candidates(costs(truth(0, 3, 2), (2, 1)), ranks=2, microbatches=4)
    assert candidates
    assert {candidate.schedule.placement for candidate in candidates} == {Placement(2)}


# -- memory ----------------------------------------------------------------------------------------


def test_no_candidate_exceeds_the_memory_limit():
    """Less memory makes the best candidate slower, until there is none."""
    known = costs(truth(1, 8, 2), (4, 4), LayerBytes([5.0] * 10, [1.0] * 10))
    needs, seconds = [], []
    limit = math.inf
    while candidates := find_candidates(known, ranks=2, microbatches=6, limit=limit):
        assert all(max(candidate.memory) <= limit for candidate in candidates)
        needs.append(max(candidates[0].memory))
        seconds.append(min(candidate.seconds for candidate in candidates))
        limit = needs[-1] - 1e-6
    assert len(needs) >= 2
    assert seconds == sorted(seconds)
    # Five of the ten layers a rank at least, one microbatch at a time.
    assert limit >= 5 * 5 + 5 - 1


def test_equally_fast_candidates_are_sorted_by_memory():
    """Without a bubble, twice the activations are not faster."""
    candidates = find_candidates(EvenCosts(1, 1, 1, 0), ranks=2, microbatches=40)
    equal = [
        candidate
        for candidate in candidates
        if candidate.seconds <= 1.01 * min(other.seconds for other in candidates)
    ]
    assert len(equal) > 2
    assert max(candidates[0].memory) == min(max(candidate.memory) for candidate in equal)
