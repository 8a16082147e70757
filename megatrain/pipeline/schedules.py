"""Pipeline schedules: pure functions from (rank, ranks, microbatches) to a list of actions.

Each is drawn for 4 ranks and 4 microbatches in its docstring, time to the right, a backward as long as two forwards.
"""

from __future__ import annotations

from collections.abc import Callable

from megatrain.pipeline.actions import Action, Schedule


def gpipe(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965, figure 2c); keeps every microbatch's activations.

        0  F0 F1 F2 F3                            B0    B1    B2    B3
        1     F0 F1 F2 F3                   B0    B1    B2    B3
        2        F0 F1 F2 F3          B0    B1    B2    B3
        3           F0 F1 F2 F3 B0    B1    B2    B3
    """
    return [Action("F", i) for i in range(microbatches)] + [Action("B", i) for i in range(microbatches)]


def one_f_one_b(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """Backwards as early as they can be (PipeDream-Flush, Megatron-LM SC21 figure 3, arXiv 2104.04473).

    Rank r keeps at most `ranks - r` microbatches' activations.

        0  F0 F1 F2 F3                B0          B1          B2    B3
        1     F0 F1 F2          B0 F3    B1          B2    B3
        2        F0 F1    B0 F2    B1 F3    B2    B3
        3           F0 B0    F1 B1    F2 B2    F3 B3
    """
    warmup = min(ranks - rank - 1, microbatches)
    forwards = [Action("F", i) for i in range(microbatches)]
    backwards = [Action("B", i) for i in range(microbatches)]
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return forwards[:warmup] + steady + backwards[microbatches - warmup :]


def forward_only(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """Evaluation: every microbatch once, nothing kept."""
    return [Action("F", i) for i in range(microbatches)]


SCHEDULES: dict[str, Callable[[int, int, int], list[Action]]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def make_schedule(name: str, ranks: int, microbatches: int) -> Schedule:
    """The named schedule for all ranks."""
    function = forward_only if name == "forward" else SCHEDULES[name]
    return [function(rank, ranks, microbatches) for rank in range(ranks)]
