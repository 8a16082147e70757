"""Pipeline schedules: pure functions from (rank, ranks, microbatches, chunks) to a list of actions.

Each docstring draws its schedule, one line per rank, time to the right: F forward, B backward, I
and W the two parts of a backward (input gradient, weight gradients). In the drawings F, I and W
take one unit of time and B takes two; small letters are the rank's second chunk. The tests hold the
same drawings as data.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise
from typing import NamedTuple, TypeVar

from megatrain.pipeline.schedule import Action, Kind, Placement, Schedule, Shape

T = TypeVar("T")


def gpipe(rank: int, ranks: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """Runs all forwards, then all backwards (GPipe, arXiv 1811.06965, figure 2c).

    A rank holds the activations of all microbatches.

    0  F0 F1 F2 F3                            B0    B1    B2    B3
    1     F0 F1 F2 F3                   B0    B1    B2    B3
    2        F0 F1 F2 F3          B0    B1    B2    B3
    3           F0 F1 F2 F3 B0    B1    B2    B3
    """
    return _each("F", 0, microbatches) + _each("B", 0, microbatches)


def one_f_one_b(rank: int, ranks: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """Runs backwards as early as possible (Megatron-LM, arXiv 2104.04473, 2.2.1).

    Also known as PipeDream-Flush. Rank r holds the activations of at most `ranks - r` microbatches.

    0  F0 F1 F2 F3                   B0       B1       B2       B3
    1     F0 F1 F2             B0    F3 B1       B2       B3
    2        F0 F1       B0    F2 B1    F3 B2       B3
    3           F0 B0    F1 B1    F2 B2    F3 B3
    """
    return _one_of_each(
        _each("F", 0, microbatches), _each("B", 0, microbatches), warmup=ranks - rank - 1
    )


def interleaved(rank: int, ranks: int, microbatches: int, chunks: int) -> list[Action]:
    """Runs 1F1B over several chunks per rank (Megatron-LM, arXiv 2104.04473, section 2.2.2).

    A group of `ranks` microbatches passes through a rank's first chunk, then through the next. The
    bubble is 1/`chunks` of that of 1F1B, with `chunks` times as many messages. The paper requires a
    multiple of `ranks` microbatches; this version distributes a remainder over larger groups.

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
    """Returns the number of forwards before the first backward.

    The first group reaches the last chunk; each later rank adds two forwards.
    """
    return 2 * (ranks - rank - 1) + (chunks - 1) * len(_groups(ranks, microbatches)[0])


def _interleaved_peak(rank: int, ranks: int, microbatches: int, chunks: int) -> int:
    return min(_interleaved_warmup(rank, ranks, microbatches, chunks) + 1, chunks * microbatches)


def zb_h1(rank: int, ranks: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """Fills the bubble at the end of 1F1B with W (Zero Bubble, arXiv 2401.10241, section 2.1).

    Rank r runs each W r microbatches after its I. All ranks hold the same number of activations: as
    many as the first rank of 1F1B. A rank only waits for the I of later ranks, and the bubble falls
    from (p-1)(F+I+W) to (p-1)(F+I-W). The drawing is the top of figure 3.

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
    """Runs two chunks per rank in a V (Zero Bubble's ZB-V, arXiv 2401.10241 and 2405.15362).

    The last stage is on the first rank, so backwards start there at once. Every rank holds as many
    activations as the first rank of 1F1B. If F, I and W take the same time, a rank waits for its
    first microbatch only. The plan is for at least 2 x ranks - 1 microbatches; with fewer, the
    actions of the missing ones are left out.

    0  F0 F1 F2 F3 F4 f0 i0 w0 f1 i1 w1 f2 i2 w2 I0 W0 f3 i3 w3 I1 W1 f4 i4 w4 I2 W2 I3 W3 I4 W4
    1     F0 F1 F2 f0 F3 f1 i0 w0 f2 i1 w1 F4 I0 W0 f3 i2 w2 I1 W1 f4 i3 w3 I2 i4 I3 W2 I4 w4 W3 W4
    2        F0 f0 F1 f1 F2 f2 i0 w0 F3 I0 W0 f3 i1 w1 F4 I1 W1 f4 i2 w2 I2 i3 I3 i4 I4 W2 w3 W3 w4 W4
    """
    planned = max(microbatches, 2 * ranks - 1)
    warmup = 2 * (ranks - rank) - 1
    writer = _ActionWriter()
    writer.repeat(warmup, "F0")
    writer.repeat(rank, "F1 F0")
    writer.repeat(ranks - rank, "F1 I1 W")
    forwards = planned - (warmup + rank)
    writer.repeat(forwards, "F0 I0 W F1 I1 W")
    writer.repeat(planned - ranks - forwards, "I0 W F1 I1 W")
    writer.repeat(rank, "I0 I1")
    writer.repeat(ranks - rank, "I0 W")
    return [action for action in writer.finish() if action.microbatch < microbatches]


def dualpipev(rank: int, ranks: int, microbatches: int, chunks: int = 2) -> list[Action]:
    """Pairs forwards and backwards on a V (DeepSeek-V3, arXiv 2412.19437, section 3.2.1).

    This is DualPipe cut in half, as in Qi et al., "DualPipe could be better without the Dual", and
    in deepseek-ai/DualPipe. In the steady state each backward stands next to an independent
    forward, so their messages and computation can overlap; this executor runs them one after the
    other. Only backwards that fill the warm-up and the end are split into I and W. A rank holds 2 x
    ranks + 1 activations. At least 2 x ranks microbatches are required.

    0  F0 F1 F2 f0 i0 w0 f1 F3 b1    f2 B0    F4 b2    f3 B1    b3    f4    B2    b4    I3 W3 I4 W4
    1     F0 f0 F1 f1 F2 b0    f2 B0    F3 b1    f3 B1    F4 b2    f4 B2    b3    B3    i4 I4 w4 W4
    """
    later = ranks - rank - 1
    writer = _ActionWriter()
    writer.repeat(2 * later, "F0")
    writer.repeat(rank + 1, "F0 F1")
    writer.repeat(later, "I1 W F1")
    writer.repeat(microbatches - 2 * ranks + rank + 1, "F0 B1 F1 B0")
    writer.repeat(later, "B1 F1 B0")
    last = ["B1", "B0"] * (rank + 1)
    writer.repeat(1, " ".join(last[: rank + 1]))
    writer.repeat(1, " ".join(last[rank + 1 :]).replace("B", "I"))
    writer.repeat(later, "W I0")
    return writer.finish()


class _ActionWriter:
    """Writes actions from tokens: `F0` is the next forward in chunk 0, `W` the oldest pending W."""

    def __init__(self) -> None:
        self._actions: list[Action] = []
        self._next: dict[tuple[bool, int], int] = {}
        self._pending: list[Action] = []

    def repeat(self, times: int, tokens: str) -> None:
        """Writes all tokens, `times` times."""
        for token in tokens.split() * times:
            self._actions.append(self._pending.pop(0) if token == "W" else self._numbered(token))

    def finish(self) -> list[Action]:
        """Writes the remaining W and returns all actions."""
        return self._actions + self._pending

    def _numbered(self, token: str) -> Action:
        kind, chunk = _KINDS[token[0]], int(token[1:])
        microbatch = self._next.get((kind == "F", chunk), 0)
        self._next[kind == "F", chunk] = microbatch + 1
        if kind == "I":
            self._pending.append(Action("W", microbatch, chunk))
        return Action(kind, microbatch, chunk)


_KINDS: dict[str, Kind] = {"F": "F", "B": "B", "I": "I"}


def _each(kind: Kind, chunk: int, microbatches: int) -> list[Action]:
    return [Action(kind, microbatch, chunk) for microbatch in range(microbatches)]


def _one_of_each(forwards: list[T], backwards: list[T], *, warmup: int) -> list[T]:
    """Returns `warmup` forwards, then forwards and backwards in turn, then the other backwards."""
    steady = [item for pair in zip(forwards[warmup:], backwards, strict=False) for item in pair]
    return forwards[:warmup] + steady + backwards[max(len(forwards) - warmup, 0) :]


def _groups(ranks: int, microbatches: int) -> list[range]:
    """Returns the most groups of at least `ranks` microbatches, the larger ones first."""
    number = max(microbatches // ranks, 1)
    bounds = [-(-microbatches * k // number) for k in range(number + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


def _by_group(ranks: int, microbatches: int, kind: Kind, chunks: range) -> list[Action]:
    return [
        Action(kind, microbatch, chunk)
        for group in _groups(ranks, microbatches)
        for chunk in chunks
        for microbatch in group
    ]


# -- by name -----------------------------------------------------------------------------------


class ScheduleSpec(NamedTuple):
    """A named schedule: its actions, its declared peaks and its requirements."""

    actions: Callable[[int, int, int, int], list[Action]]
    peak: Callable[[int, int, int, int], int]
    """Largest number of live activations, from the same four numbers as `actions`."""
    shape: Shape = "loop"
    chunks: int = 1
    """Chunks per rank by default."""
    any_chunks: bool = False
    """True if 2 or more chunks per rank are supported, not only `chunks`."""
    min_microbatches_per_rank: int = 0
    bounded_peak: bool = True
    """True if more than two microbatches per rank do not raise a rank's peak."""

    def min_microbatches(self, ranks: int) -> int:
        """Returns the smallest supported number of microbatches."""
        return max(1, self.min_microbatches_per_rank * ranks)


SCHEDULES: dict[str, ScheduleSpec] = {
    "gpipe": ScheduleSpec(
        gpipe, lambda rank, ranks, microbatches, chunks: microbatches, bounded_peak=False
    ),
    "1f1b": ScheduleSpec(
        one_f_one_b, lambda rank, ranks, microbatches, chunks: min(ranks - rank, microbatches)
    ),
    "interleaved": ScheduleSpec(
        interleaved, _interleaved_peak, chunks=2, any_chunks=True, bounded_peak=False
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
        min_microbatches_per_rank=2,
    ),
}


def build_schedule(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """Returns a built-in schedule for all ranks, without the checks of `registry.make_schedule`.

    The name `forward` gives the forwards of 1F1B.
    """
    if name == "forward":
        return forward_only(build_schedule("1f1b", ranks, microbatches))
    return from_spec(name, SCHEDULES[name], ranks, microbatches, chunks)


def from_spec(
    name: str, spec: ScheduleSpec, ranks: int, microbatches: int, chunks: int | None = None
) -> Schedule:
    """Returns the schedule of a spec for all ranks; `chunks` defaults to that of the spec."""
    chunks = spec.chunks if chunks is None else chunks
    return Schedule(
        name,
        Placement(ranks, chunks, spec.shape),
        actions=[spec.actions(rank, ranks, microbatches, chunks) for rank in range(ranks)],
        peaks=[spec.peak(rank, ranks, microbatches, chunks) for rank in range(ranks)],
    )


def forward_only(schedule: Schedule) -> Schedule:
    """Returns the forwards of a schedule in their order, for evaluation; holds no activations."""
    actions = [[action for action in actions if action.kind == "F"] for actions in schedule.actions]
    return Schedule(f"{schedule.name} forward", schedule.placement, actions, [0] * len(actions))
