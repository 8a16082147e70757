"""Partitions the list of layers into stages, balanced by cost; each layer belongs to one stage."""

from __future__ import annotations

from itertools import pairwise

from megatrain.errors import ConfigError


def cut_layers(costs: list[float], stages: int, *, chunks: int = 1) -> list[range]:
    """Returns the layers of each stage: contiguous, not empty, with the smallest maximal cost.

    Among cuts with the same maximum, the one with the least sum of squares is returned, which
    balances the other stages too. Embedding and head count with their cost like any layer.

    Args:
        costs: cost of each layer, from embedding to head.
        stages: number of stages.
        chunks: stages per rank, for error messages.

    Raises:
        ConfigError: if there are more stages than blocks.
    """
    check_stages(stages, blocks=len(costs) - 2, chunks=chunks)
    cuts = _best_cuts(costs, stages)
    return [range(first, last) for first, last in pairwise([0, *cuts, len(costs)])]


def cut_by_counts(
    counts: list[int], costs: list[float], stages: int, *, chunks: int = 1
) -> list[range]:
    """Returns the layers of each stage with `counts` blocks each.

    The embedding belongs to the first stage and the head to the last.

    Raises:
        ConfigError: if the counts do not match the model and the stages; its fix is the balanced
        cut.
    """
    blocks = len(costs) - 2
    if len(counts) != stages:
        requirement = f"has {len(counts)} numbers, but the model has {stages} stages"
    elif min(counts) < 1:
        requirement = "must have at least one block in each stage"
    elif sum(counts) != blocks:
        requirement = f"has the sum {sum(counts)}, but num_hidden_layers={blocks}"
    else:
        bounds = [0, *(1 + sum(counts[: stage + 1]) for stage in range(stages - 1)), len(costs)]
        return [range(first, last) for first, last in pairwise(bounds)]
    balanced = blocks_per_stage(cut_layers(costs, stages, chunks=chunks))
    raise ConfigError(
        "parallel.layers_per_stage",
        counts,
        requirement,
        f"use {balanced}, or leave it out",
        fix={"parallel.layers_per_stage": balanced},
    )


def blocks_per_stage(cut: list[range]) -> list[int]:
    """Returns the number of blocks of each stage: its layers without embedding and head."""
    head = cut[-1].stop - 1
    return [min(stage.stop, head) - max(stage.start, 1) for stage in cut]


def check_stages(stages: int, *, blocks: int, chunks: int = 1) -> None:
    """Raises ConfigError if there are more stages than blocks."""
    if stages <= max(blocks, 1):
        return
    ranks = stages // chunks
    if chunks == 1:
        raise ConfigError(
            "parallel.pipeline",
            ranks,
            f"must be at most num_hidden_layers={blocks}",
            fix={"parallel.pipeline": blocks},
        )
    fewer_ranks = f"set at most {blocks // chunks}, or " if blocks >= chunks else ""
    raise ConfigError(
        "parallel.pipeline",
        ranks,
        f"with {chunks} virtual stages per rank gives {stages} stages, more than "
        f"num_hidden_layers={blocks}",
        f"{fewer_ranks}use fewer virtual stages (parallel.virtual, parallel.schedule)",
        fix=(
            {"parallel.pipeline": blocks // chunks}
            if blocks >= chunks
            else {"parallel.schedule": "1f1b", "parallel.virtual": None}
        ),
    )


def _best_cuts(costs: list[float], stages: int) -> list[int]:
    """Minimizes (maximum, sum of squares) by dynamic programming over stages and first layers."""
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
                if before is None or not _has_block(first, last, total, stages):
                    continue
                cost = sums[last] - sums[first]
                candidate = (max(before[0], cost), before[1] + cost * cost, [*before[2], last])
                current = following[last]
                if current is None or candidate[:2] < current[:2]:
                    following[last] = candidate
        best = following
    found = best[total]
    assert found is not None
    return found[2][:-1]


def _has_block(first: int, last: int, total: int, stages: int) -> bool:
    """Returns True if the layers include a block: a stage of embedding or head alone would idle."""
    return stages == 1 or (min(last, total - 1) - max(first, 1)) >= 1
