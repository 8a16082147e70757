"""Finds the rank that blocks a stalled run, from the states that all ranks report.

A rank that receives waits for the sender. A rank in a collective waits for the members of its group
that are not in the collective:

    rank 0   recv B2 from rank 1    ->  1
    rank 1   recv B2 from rank 2    ->  2
    rank 2   all-reduce data of 2 3 ->  3
    rank 3   loading data               waits for no rank: it blocks all four
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class RankState(NamedTuple):
    """The state of a rank as it reports it.

    `step` is the current step, `activity` the current action, `waits_for` the ranks that must act
    before it continues, `age` the seconds since its last progress.
    """

    step: int
    activity: str
    waits_for: range | tuple[int, ...]
    age: float

    def __str__(self) -> str:
        return f"step {self.step}, {self.activity}" if self.step else self.activity

    def to_json(self) -> dict[str, Any]:
        """Returns the state as JSON values; ranges stay short."""
        waits = self.waits_for
        ranks = {"from": waits.start, "to": waits.stop} if isinstance(waits, range) else waits
        return {**self._asdict(), "waits_for": ranks}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> RankState:
        """Reads what `to_json` returns."""
        waits = raw["waits_for"]
        ranks = range(waits["from"], waits["to"]) if isinstance(waits, dict) else tuple(waits)
        return cls(raw["step"], raw["activity"], ranks, raw["age"])


def compact(ranks: Sequence[int]) -> range | tuple[int, ...]:
    """Returns consecutive ranks as a range: messages stay small with thousands of ranks."""
    if len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return range(ranks[0], ranks[-1] + 1)
    return tuple(ranks)


def find_blocking_ranks(states: Mapping[int, RankState], silent: Iterable[int]) -> list[int]:
    """Returns the ranks that all others wait for; empty if they wait for each other in a cycle.

    Args:
        states: the states of the ranks that answered.
        silent: the ranks that did not answer. If there are any, these block the run.
    """
    if missing := sorted(silent):
        return missing
    waits = _waits(states)
    ends = {rank for rank in states if not waits[rank]}
    waiting = Counter(end for rank in states for end in _reachable(rank, waits) & ends)
    if not ends:
        return []

    def order(rank: int) -> tuple[bool, int, int]:
        """Sorts working ranks before complete collectives, then by waiting ranks, then by step."""
        return bool(states[rank].waits_for), -waiting[rank], states[rank].step

    first = min(order(rank) for rank in ends)
    return sorted(rank for rank in ends if order(rank) == first)


class _Wait(NamedTuple):
    """A collective or a receive; equal for all ranks that are in the same collective."""

    step: int
    label: str
    waits_for: range | tuple[int, ...]


def _wait(state: RankState) -> _Wait:
    return _Wait(state.step, state.activity.partition(" (")[0], state.waits_for)


def _waits(states: Mapping[int, RankState]) -> dict[int, list[int]]:
    """Returns the ranks that each rank waits for, without those in the same collective."""
    inside: dict[_Wait, set[int]] = defaultdict(set)
    for rank, state in states.items():
        inside[_wait(state)].add(rank)
    missing = {
        wait: sorted(set(wait.waits_for) & states.keys() - ranks) for wait, ranks in inside.items()
    }
    return {rank: missing[_wait(state)] for rank, state in states.items()}


def _reachable(rank: int, waits: Mapping[int, list[int]]) -> set[int]:
    """Returns the rank and all ranks that it waits for, directly or indirectly."""
    found, front = {rank}, [rank]
    while front:
        for peer in waits[front.pop()]:
            if peer not in found:
                found.add(peer)
                front.append(peer)
    return found
