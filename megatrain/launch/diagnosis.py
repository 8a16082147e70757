"""Whom everyone waits for when no rank of a run gets on, as a matter of plain data.

A rank that receives waits for the sender, one in a collective for those of its line that are not in it:

    rank 0   recv B2 from rank 1    ->  1
    rank 1   recv B2 from rank 2    ->  2
    rank 2   all-reduce data of 2 3 ->  3
    rank 3   loading data               waits for nobody: all four wait for it
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class ProcessState(NamedTuple):
    """What a rank says of itself: the step, what it is in, whom it waits for there, and for how many seconds."""

    step: int
    words: str
    waits_for: range | tuple[int, ...]
    age: float

    def to_json(self) -> dict[str, Any]:
        waits = self.waits_for
        return {
            **self._asdict(),
            "waits_for": {"from": waits.start, "to": waits.stop}
            if isinstance(waits, range)
            else waits,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ProcessState:
        waits = raw["waits_for"]
        return cls(
            raw["step"],
            raw["words"],
            range(waits["from"], waits["to"]) if isinstance(waits, dict) else tuple(waits),
            raw["age"],
        )


def compact(ranks: Sequence[int]) -> range | tuple[int, ...]:
    """As a range where they are one: thousands of ranks that wait for thousands are little then."""
    if len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return range(ranks[0], ranks[-1] + 1)
    return tuple(ranks)


def find_blocking_rank(states: Mapping[int, ProcessState], silent: Iterable[int]) -> list[int]:
    """The ranks that everyone waits for; none when they wait for each other in a circle.

    Args:
        states: of the ranks that answer.
        silent: those that do not. Nobody can get on without them, so they are the ones.
    """
    if absent := sorted(silent):
        return absent
    waits = _waits(states)
    ends = {rank for rank in states if not waits[rank]}
    waited_for = Counter(end for rank in states for end in _reached(rank, waits) & ends)
    if not ends:
        return []

    # Those that work before those whose collective is complete and still does not end; then those that most wait for; then
    # those that are furthest behind.
    def order(rank: int) -> tuple[bool, int, int]:
        return bool(states[rank].waits_for), -waited_for[rank], states[rank].step

    best = min(order(rank) for rank in ends)
    return sorted(rank for rank in ends if order(rank) == best)


def _waits(states: Mapping[int, ProcessState]) -> dict[int, list[int]]:
    """Whom each rank waits for. In a collective that is not those that are in it too."""
    inside: dict[_Wait, set[int]] = defaultdict(set)
    for rank, state in states.items():
        inside[_wait(state)].add(rank)
    missing = {
        wait: sorted(set(wait.waits_for) & states.keys() - ranks) for wait, ranks in inside.items()
    }
    return {rank: missing[_wait(state)] for rank, state in states.items()}


class _Wait(NamedTuple):
    step: int
    label: str
    waits_for: range | tuple[int, ...]


def _wait(state: ProcessState) -> _Wait:
    """Equal for those that are in the same collective, whatever each is doing there."""
    return _Wait(state.step, state.words.partition(" (")[0], state.waits_for)


def _reached(rank: int, waits: Mapping[int, list[int]]) -> set[int]:
    """The rank and all that it waits for, directly or not."""
    found, front = {rank}, [rank]
    while front:
        for peer in waits[front.pop()]:
            if peer not in found:
                found.add(peer)
                front.append(peer)
    return found
