"""Cuts the list of layers into stages, balanced by cost, each layer on exactly one stage."""

from __future__ import annotations

from itertools import pairwise

from megatrain.errors import ConfigError


def cut_layers(costs: list[float], stages: int, *, chunks: int = 1) -> list[range]:
    """Contiguous ranges of layers, one a stage, none empty, whose most costly is as cheap as it can be.

    Among the cuts with that best maximum, the one with the least sum of squares: the other stages are even too.
    Embedding and head count with their cost like any layer.

    `chunks` is how many of the stages each rank holds (`Placement.stages_of` says which).

    Raises ConfigError when there are more stages than blocks to give each at least one.
    """
    check_stages(stages, blocks=len(costs) - 2, chunks=chunks)
    cuts = _best_cuts(costs, stages)
    ranges = [
        range(first, last) for first, last in zip([0, *cuts], [*cuts, len(costs)], strict=True)
    ]
    assert [layer for stage in ranges for layer in stage] == list(range(len(costs))), (
        "every layer on exactly one stage"
    )
    return ranges


def check_stages(stages: int, *, blocks: int, chunks: int = 1) -> None:
    """Refuse more stages than there are blocks to give each at least one."""
    if stages > max(blocks, 1):
        raise _too_many(stages, blocks, chunks)


def cut_as_told(
    counts: list[int], costs: list[float], stages: int, *, chunks: int = 1
) -> list[range]:
    """Ranges of layers, one a stage, with `counts` blocks each; embedding goes to the first stage and head to the last.

    Raises ConfigError when that is not a cut of this model into that many stages, with the cut by cost as the way out.
    """
    balanced = blocks_per_stage(cut_layers(costs, stages, chunks=chunks))
    blocks = len(costs) - 2
    if len(counts) != stages:
        rule = f"has {len(counts)} numbers and the model is cut into {stages} stages"
    elif min(counts) < 1:
        rule = "leaves a stage without a block"
    elif sum(counts) != blocks:
        rule = f"adds up to {sum(counts)} and num_hidden_layers={blocks}"
    else:
        bounds = [0, *(1 + sum(counts[: stage + 1]) for stage in range(stages - 1)), len(costs)]
        return [range(first, last) for first, last in pairwise(bounds)]
    raise ConfigError(
        "parallel.layers_per_stage", counts, rule, f"for example {balanced}, or leave it out"
    )


def blocks_per_stage(cut: list[range]) -> list[int]:
    """How many blocks each stage of a cut has: its layers without embedding and head."""
    head = cut[-1].stop - 1
    return [min(stage.stop, head) - max(stage.start, 1) for stage in cut]


def _too_many(stages: int, blocks: int, chunks: int) -> ConfigError:
    ranks = stages // chunks
    if chunks == 1:
        return ConfigError(
            "parallel.pipeline",
            ranks,
            f"is more than num_hidden_layers={blocks}",
            f"use at most {blocks}",
        )
    fewer_ranks = (
        f"use parallel.pipeline={blocks // chunks} or less, or " if blocks >= chunks else "use "
    )
    return ConfigError(
        "parallel.pipeline",
        ranks,
        f"with {chunks} chunks of layers a rank makes {stages} stages, more than num_hidden_layers={blocks}",
        f"{fewer_ranks}a schedule or parallel.virtual with fewer chunks",
    )


def _best_cuts(costs: list[float], stages: int) -> list[int]:
    """Dynamic programme over (stages left, first layer): least (maximum, sum of squares)."""
    total = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best: list[tuple[float, float, list[int]] | None] = [(0.0, 0.0, [])] + [None] * total
    for _stage in range(stages):
        following: list[tuple[float, float, list[int]] | None] = [None] * (total + 1)
        for last in range(1, total + 1):
            for first in range(last):
                before = best[first]
                if before is None or not _holds_block(first, last, total, stages):
                    continue
                cost = sums[last] - sums[first]
                candidate = (max(before[0], cost), before[1] + cost * cost, [*before[2], last])
                held = following[last]
                if held is None or candidate[:2] < held[:2]:
                    following[last] = candidate
        best = following
    found = best[total]
    assert found is not None
    return found[2][:-1]


def _holds_block(first: int, last: int, total: int, stages: int) -> bool:
    """A stage of embedding or head alone would only wait; with one stage all is in it."""
    return stages == 1 or (min(last, total - 1) - max(first, 1)) >= 1
