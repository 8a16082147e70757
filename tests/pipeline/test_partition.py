"""Partition of the list of layers into stages."""

import itertools

import pytest

from megatrain.errors import ConfigError
from megatrain.pipeline.partition import cut_by_counts, cut_layers
from megatrain.pipeline.schedule import Placement


def worst(costs, bounds):
    return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *bounds, len(costs)]))


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "costs", [[1, 10, 10, 10, 10, 10, 10, 25], [0, 1, 2, 3, 4, 5, 6, 0], [9, 1, 1, 1, 1, 1, 1, 9]]
)
def test_each_layer_is_on_one_stage_and_the_worst_stage_is_the_best_of_all_cuts(costs, stages):
    ranges = cut_layers([float(cost) for cost in costs], stages)
    assert [layer for stage in ranges for layer in stage] == list(range(len(costs)))
    blocks = range(1, len(costs) - 1)
    assert all(set(stage) & set(blocks) for stage in ranges)
    possible = itertools.combinations(range(2, len(costs) - 1), stages - 1)
    assert max(sum(costs[layer] for layer in stage) for stage in ranges) == min(
        worst(costs, bounds) for bounds in possible
    )


def test_chunks_of_all_ranks_are_all_stages():
    placement = Placement(4, 2, "v")
    assert [placement.stages_of(rank) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert Placement(2, 3).stages_of(1) == [1, 3, 5]


@pytest.mark.parametrize(
    ("stages", "chunks", "message", "fix"),
    [
        (
            7,
            1,
            "parallel.pipeline=7 must be at most num_hidden_layers=6",
            {"parallel.pipeline": 6},
        ),
        (
            8,
            2,
            "parallel.pipeline=4 with 2 virtual stages per rank gives 8 stages, more than "
            "num_hidden_layers=6; set at most 3, or use fewer virtual stages "
            "(parallel.virtual, parallel.schedule)",
            {"parallel.pipeline": 3},
        ),
        (
            16,
            8,
            "parallel.pipeline=2 with 8 virtual stages per rank gives 16 stages, more than "
            "num_hidden_layers=6; use fewer virtual stages (parallel.virtual, parallel.schedule)",
            {"parallel.schedule": "1f1b", "parallel.virtual": None},
        ),
    ],
)
def test_more_stages_than_blocks(stages, chunks, message, fix):
    with pytest.raises(ConfigError) as error:
        cut_layers([1.0] * 8, stages, chunks=chunks)
    assert str(error.value) == message
    assert error.value.fix == fix


@pytest.mark.parametrize(
    ("counts", "requirement"),
    [
        ([3, 2, 1], "has 3 numbers, but the model has 2 stages"),
        ([6, 0], "must have at least one block in each stage"),
        ([3, 4], "has the sum 7, but num_hidden_layers=6"),
    ],
)
def test_counts_that_do_not_match_the_model(counts, requirement):
    with pytest.raises(ConfigError) as error:
        cut_by_counts(counts, [1.0] * 8, 2)
    assert error.value.requirement == requirement
    assert error.value.fix == {"parallel.layers_per_stage": [3, 3]}
    assert cut_by_counts([3, 3], [1.0] * 8, 2) == [range(4), range(4, 8)]
