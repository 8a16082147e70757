"""Pipeline schedules: pure functions from (rank, ranks, microbatches, chunks) to a list of actions.

Each is drawn in its docstring, time to the right, one line a rank: F forward, B backward, I and W a backward's two parts
(gradient of the input, gradients of the weights). In the drawings all of F, I and W take the same time and B takes two;
small letters are the rank's second chunk of layers. The tests hold the same drawings as data.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise
from typing import Literal, NamedTuple, TypeVar

from megatrain.pipeline.schedule import Action, Kind, Placement, Schedule

T = TypeVar("T")


def gpipe(rank: int, ranks: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965, figure 2c); holds every microbatch's activations.

    0  F0 F1 F2 F3                            B0    B1    B2    B3
    1     F0 F1 F2 F3                   B0    B1    B2    B3
    2        F0 F1 F2 F3          B0    B1    B2    B3
    3           F0 F1 F2 F3 B0    B1    B2    B3
    """
    return _each("F", 0, microbatches) + _each("B", 0, microbatches)


def one_f_one_b(rank: int, ranks: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """Backwards as early as they can be (PipeDream-Flush; Megatron-LM, arXiv 2104.04473, section 2.2.1, figure 4 top).

    Rank r holds at most `ranks - r` microbatches' activations.

        0  F0 F1 F2 F3                   B0       B1       B2       B3
        1     F0 F1 F2             B0    F3 B1       B2       B3
        2        F0 F1       B0    F2 B1    F3 B2       B3
        3           F0 B0    F1 B1    F2 B2    F3 B3
    """
    return _one_of_each(
        _each("F", 0, microbatches), _each("B", 0, microbatches), warmup=ranks - rank - 1
    )


def interleaved(rank: int, ranks: int, microbatches: int, chunks: int) -> list[Action]:
    """1F1B over several chunks a rank, placed in a loop (Megatron-LM, arXiv 2104.04473, section 2.2.2, figure 4 bottom).

    Microbatches go in groups of `ranks`: a group goes through a rank's first chunk, then through the next. The bubble is a
    `chunks`-th of 1F1B's, for `chunks` times as many messages. The paper asks for a multiple of `ranks` microbatches; here
    the groups share out what is over, and are larger.

        0  F0 F1 F2 F3 f0 f1 f2 f3                   b0       b1       b2       b3    B0    B1    B2    B3
        1     F0 F1 F2 F3 f0 f1 f2 f3          b0       b1       b2       b3    B0    B1    B2    B3
        2        F0 F1 F2 F3 f0 f1 f2    b0    f3 b1       b2       b3    B0    B1    B2    B3
        3           F0 F1 F2 F3 f0 b0    f1 b1    f2 b2    f3 b3    B0    B1    B2    B3
    """
    forwards = _by_group(ranks, microbatches, "F", range(chunks))
    backwards = _by_group(ranks, microbatches, "B", range(chunks)[::-1])
    return _one_of_each(
        forwards, backwards, warmup=_interleaved_warmup(rank, ranks, microbatches, chunks)
    )


def _interleaved_warmup(rank: int, ranks: int, microbatches: int, chunks: int) -> int:
    """Forwards before the first backward: until the first group is in the last chunk, and two for each rank behind."""
    return 2 * (ranks - rank - 1) + (chunks - 1) * len(_groups(ranks, microbatches)[0])


def _interleaved_peak(rank: int, ranks: int, microbatches: int, chunks: int) -> int:
    return min(_interleaved_warmup(rank, ranks, microbatches, chunks) + 1, chunks * microbatches)


def zb_h1(rank: int, ranks: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """1F1B whose W fill the bubble at the end (Zero Bubble, arXiv 2401.10241, section 2.1, figure 3 top).

    Rank r does each W r microbatches later than its I, so all ranks hold the same number of activations: as many as 1F1B
    on its first rank. A rank waits for I alone of those behind it, and the bubble falls from (p-1)(F+I+W) to (p-1)(F+I-W).

        0  F0 F1 F2 F3          I0 W0 I1 W1 I2 W2 I3 W3
        1     F0 F1 F2       I0 F3 I1 W0 I2 W1 I3 W2 W3
        2        F0 F1    I0 F2 I1 F3 I2 W0 I3 W1 W2 W3
        3           F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3
    """
    forwards = [[action] for action in _each("F", 0, microbatches)]
    backwards = [[action] for action in _each("I", 0, microbatches)]
    for microbatch, action in enumerate(_each("W", 0, microbatches)):
        backwards[min(microbatch + rank, microbatches - 1)].append(action)
    ordered = _one_of_each(forwards, backwards, warmup=ranks - rank - 1)
    return list(chain.from_iterable(ordered))


def zb_v(rank: int, ranks: int, microbatches: int, chunks: int = 2) -> list[Action]:
    """Two chunks a rank placed in a V (Zero Bubble, arXiv 2401.10241, section on ZB-V, and arXiv 2405.15362).

    The last stage is on the first rank, so backwards start there at once and every rank holds as many activations as 1F1B
    on its first rank. When F, I and W take the same time, a rank waits for nothing but its first microbatch. The plan
    is for at least 2 x ranks - 1 microbatches; for fewer, those that are not there are left out of it.

        0  F0 F1 F2 F3 F4 f0 i0 w0 f1 i1 w1 f2 i2 w2 I0 W0 f3 i3 w3 I1 W1 f4 i4 w4 I2 W2 I3 W3 I4 W4
        1     F0 F1 F2 f0 F3 f1 i0 w0 f2 i1 w1 F4 I0 W0 f3 i2 w2 I1 W1 f4 i3 w3 I2 i4 I3 W2 I4 w4 W3 W4
        2        F0 f0 F1 f1 F2 f2 i0 w0 F3 I0 W0 f3 i1 w1 F4 I1 W1 f4 i2 w2 I2 i3 I3 i4 I4 W2 w3 W3 w4 W4
    """
    planned = max(microbatches, 2 * ranks - 1)
    warmup = 2 * (ranks - rank) - 1
    steps = _Steps()
    steps.repeat(warmup, "F0")
    steps.repeat(rank, "F1 F0")
    steps.repeat(ranks - rank, "F1 I1 W")
    forwards = planned - (warmup + rank)
    steps.repeat(forwards, "F0 I0 W F1 I1 W")
    steps.repeat(planned - ranks - forwards, "I0 W F1 I1 W")
    steps.repeat(rank, "I0 I1")
    steps.repeat(ranks - rank, "I0 W")
    steps.finish()
    return [action for action in steps.actions if action.microbatch < microbatches]


def dualpipev(rank: int, ranks: int, microbatches: int, chunks: int = 2) -> list[Action]:
    """Forward and backward in pairs on a V (DeepSeek-V3, arXiv 2412.19437, section 3.2.1, DualPipe cut in half).

    The cut is that of Qi et al., "DualPipe could be better without the Dual", and of deepseek-ai/DualPipe. In the steady
    state each backward stands beside a forward that needs nothing of it, so their messages and computing can overlap; here
    they follow each other. Only the backwards that fill the warm-up and the end are split into I and W. A rank holds
    2 x ranks + 1 activations, and 2 x ranks microbatches are the fewest.

        0  F0 F1 F2 f0 i0 w0 f1 F3 b1    f2 B0    F4 b2    f3 B1    b3    f4    B2    b4    I3 W3 I4 W4
        1     F0 f0 F1 f1 F2 b0    f2 B0    F3 b1    f3 B1    F4 b2    f4 B2    b3    B3    i4 I4 w4 W4
    """
    others = ranks - rank - 1
    steps = _Steps()
    steps.repeat(2 * others, "F0")
    steps.repeat(rank + 1, "F0 F1")
    steps.repeat(others, "I1 W F1")
    steps.repeat(microbatches - 2 * ranks + rank + 1, "F0 B1 F1 B0")
    steps.repeat(others, "B1 F1 B0")
    last = ["B1", "B0"] * (rank + 1)
    whole, split = last[: rank + 1], last[rank + 1 :]
    steps.repeat(1, " ".join(whole))
    steps.repeat(1, " ".join(word.replace("B", "I") for word in split))
    steps.repeat(others, "W I0")
    steps.finish()
    return steps.actions


class _Steps:
    """Writes a list of actions from words: F0 is the next microbatch's forward in chunk 0, W the oldest W to be done."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: dict[tuple[bool, int], int] = {}
        self._waiting: list[Action] = []

    def repeat(self, times: int, words: str) -> None:
        """Write all words, `times` times."""
        for _ in range(times):
            for word in words.split():
                self.actions.append(self._waiting.pop(0) if word == "W" else self._counted(word))

    def finish(self) -> None:
        """Write the W that are left."""
        self.repeat(len(self._waiting), "W")

    def _counted(self, word: str) -> Action:
        kind, chunk = _KINDS[word[0]], int(word[1:])
        microbatch = self._next.get((kind == "F", chunk), 0)
        self._next[kind == "F", chunk] = microbatch + 1
        if kind == "I":
            self._waiting.append(Action("W", microbatch, chunk))
        return Action(kind, microbatch, chunk)


_KINDS: dict[str, Kind] = {"F": "F", "B": "B", "I": "I"}


def _each(kind: Kind, chunk: int, microbatches: int) -> list[Action]:
    return [Action(kind, microbatch, chunk) for microbatch in range(microbatches)]


def _one_of_each(forwards: list[T], backwards: list[T], *, warmup: int) -> list[T]:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    steady = [item for pair in zip(forwards[warmup:], backwards, strict=False) for item in pair]
    return forwards[:warmup] + steady + backwards[max(len(forwards) - warmup, 0) :]


def _groups(ranks: int, microbatches: int) -> list[range]:
    """Microbatches in as many groups of at least `ranks` as there can be, the larger ones first; one group if they are few."""
    number = max(microbatches // ranks, 1)
    bounds = [-(-microbatches * k // number) for k in range(number + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


def _by_group(ranks: int, microbatches: int, kind: Kind, chunks: range) -> list[Action]:
    groups = _groups(ranks, microbatches)
    return [
        Action(kind, microbatch, chunk)
        for group in groups
        for chunk in chunks
        for microbatch in group
    ]


# -- by name -----------------------------------------------------------------------------------------------------------


class ScheduleSpec(NamedTuple):
    """A named schedule: its actions, what it promises, and what it asks for."""

    actions: Callable[[int, int, int, int], list[Action]]
    peak: Callable[[int, int, int, int], int]
    """The most live activations, from the same four numbers as `actions`."""
    shape: Literal["loop", "v"] = "loop"
    chunks: int = 1
    """Chunks a rank unless told otherwise."""
    any_chunks: bool = False
    """Whether it can be told otherwise: 2 or more."""
    microbatches_a_rank: int = 0
    """The fewest microbatches, in multiples of the number of ranks."""
    settles: bool = True
    """Whether more than two microbatches a rank make no difference to what a rank holds at most."""

    def fewest_microbatches(self, ranks: int) -> int:
        """The fewest that the schedule can do."""
        return max(1, self.microbatches_a_rank * ranks)


SCHEDULES: dict[str, ScheduleSpec] = {
    "gpipe": ScheduleSpec(
        gpipe, lambda rank, ranks, microbatches, chunks: microbatches, settles=False
    ),
    "1f1b": ScheduleSpec(
        one_f_one_b, lambda rank, ranks, microbatches, chunks: min(ranks - rank, microbatches)
    ),
    "interleaved": ScheduleSpec(
        interleaved, _interleaved_peak, chunks=2, any_chunks=True, settles=False
    ),
    "zb-h1": ScheduleSpec(
        zb_h1, lambda rank, ranks, microbatches, chunks: min(ranks, microbatches)
    ),
    "zb-v": ScheduleSpec(
        zb_v, lambda rank, ranks, microbatches, chunks: 2 * min(ranks, microbatches), "v", chunks=2
    ),
    "dualpipev": ScheduleSpec(
        dualpipev,
        lambda rank, ranks, microbatches, chunks: 2 * ranks + 1,
        "v",
        chunks=2,
        microbatches_a_rank=2,
    ),
}


def make_schedule(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The named schedule for all ranks; `choose_schedule` refuses numbers that it cannot do."""
    if name == "forward":
        return forward_only(make_schedule("1f1b", ranks, microbatches))
    family = SCHEDULES[name]
    chunks = family.chunks if chunks is None else chunks
    return Schedule(
        name,
        Placement(ranks, chunks, family.shape),
        actions=[family.actions(rank, ranks, microbatches, chunks) for rank in range(ranks)],
        peaks=[family.peak(rank, ranks, microbatches, chunks) for rank in range(ranks)],
    )


def forward_only(schedule: Schedule) -> Schedule:
    """Evaluation: the schedule's forwards in its own order and placement. Legal where the schedule is; nothing is held."""
    actions = [[action for action in of_rank if action.kind == "F"] for of_rank in schedule.actions]
    return Schedule(f"{schedule.name} forward", schedule.placement, actions, [0] * len(actions))
