"""A schedule made for given times: greedy list scheduling, for stages that are not even.

Time is walked through from one start of an action to the next, on whichever rank can start one first. There the rank
takes, of what has arrived, a backward before a forward and both before weight gradients (W), which fill its waiting. It may
hold so many activations and no more; a forward leaves room for one of each later chunk of its rank, so that what has begun can
always be finished. For 2 ranks, stage 1 twice as slow as stage 0 (F, I, W take 1 there and 2 on stage 1), 2 activations:

    0  F0F1            I0  W0    I1W1
    1    F0  I0  F1  W0  I1  W1

What comes out is plain data, proven legal by the same checker as any other schedule.
"""

from __future__ import annotations

from typing import NamedTuple

from megatrain.pipeline.schedule import Action, Kind, Placement, Schedule, peak_activations
from megatrain.pipeline.simulator import Times


class SchedulingRules(NamedTuple):
    """How the greedy choice is made; which is best depends on the times."""

    held: int
    """Microbatches that a rank may hold, each counted once for all its chunks."""
    split: bool = True
    """Whether backwards are split into I and W."""
    look_ahead: bool = False
    """Whether a W is put off when it would end after the next action's arrival."""


def list_schedule(
    placement: Placement, microbatches: int, times: Times, rules: SchedulingRules
) -> Schedule:
    """A schedule for these times by these rules; its peaks are those that its actions have."""
    ranks = [_Rank(rank, placement, microbatches, times, rules) for rank in range(placement.ranks)]
    first = placement.location(0)
    ranks[first.rank].arrive(
        [(0.0, Action("F", microbatch, first.chunk)) for microbatch in range(microbatches)]
    )
    starts: list[float | None] = [rank.next_start() for rank in ranks]
    while any(start is not None for start in starts):
        at, number = min(
            (start, number) for number, start in enumerate(starts) if start is not None
        )
        action, end = ranks[number].take(at)
        target = placement.consumer(number, action)
        if target is not None:
            kind: Kind = "F" if action.kind == "F" else ranks[number].backward
            travel = times.send if target.rank != number else 0.0
            ranks[target.rank].arrive(
                [(end + travel, Action(kind, action.microbatch, target.chunk))]
            )
            starts[target.rank] = ranks[target.rank].next_start()
        starts[number] = ranks[number].next_start()
    actions = [rank.done for rank in ranks]
    return Schedule("list", placement, actions, [peak_activations(of_rank) for of_rank in actions])


class _Rank:
    """A rank: what has arrived or is on its way, what it holds, and what it has done."""

    def __init__(
        self,
        rank: int,
        placement: Placement,
        microbatches: int,
        times: Times,
        rules: SchedulingRules,
    ) -> None:
        self.placement, self.times, self.rules = placement, times, rules
        self.rank, self.stages = rank, placement.stages_of(rank)
        self.backward: Kind = "I" if rules.split else "B"
        self.room = rules.held * placement.chunks
        self.free, self.held = 0.0, 0
        self.coming: list[tuple[float, Action]] = []
        self.done: list[Action] = []

    def arrive(self, actions: list[tuple[float, Action]]) -> None:
        """Take note of actions and when each can start."""
        self.coming += actions

    def next_start(self) -> float | None:
        """When this rank can next start anything that it has room for; None when there is nothing."""
        possible = [moment for moment, action in self.coming if self._fits(action)]
        if not possible:
            return None
        at = max(self.free, min(possible))
        chosen = self._choose(at)
        return at if chosen is not None else self._next_arrival(at)

    def take(self, at: float) -> tuple[Action, float]:
        """Do the best action that can start at this time; its end."""
        chosen = self._choose(at)
        assert chosen is not None, "next_start says when there is one"
        self.coming.remove(chosen)
        action = chosen[1]
        self.done.append(action)
        self.held += action.kind == "F"
        self.held -= action.kind in ("B", "W")
        self.free = at + self.times.duration(action, self.stages[action.chunk])
        if action.kind == "F" and self.stages[action.chunk] == self.placement.stages - 1:
            self.coming.append((self.free, action._replace(kind=self.backward)))
        if action.kind == "I":
            self.coming.append((self.free, action._replace(kind="W")))
        return action, self.free

    def _fits(self, action: Action) -> bool:
        """Forwards leave room for one activation of each later chunk."""
        return action.kind != "F" or self.held + len(self.stages) - action.chunk <= self.room

    def _choose(self, at: float) -> tuple[float, Action] | None:
        """What to start; None to wait for what comes next."""
        here = [item for item in self.coming if item[0] <= at and self._fits(item[1])]
        if not here:
            return None
        best = min(here, key=lambda item: self._order(item[1]))
        if best[1].kind == "W" and self.rules.look_ahead:
            later = self._next_arrival(at)
            if later is not None and later < at + self.times.duration(
                best[1], self.stages[best[1].chunk]
            ):
                return None
        return best

    def _next_arrival(self, at: float) -> float | None:
        """Of what is not a W and there is room for."""
        return min(
            (
                moment
                for moment, action in self.coming
                if moment > at and action.kind != "W" and self._fits(action)
            ),
            default=None,
        )

    def _order(self, action: Action) -> tuple[int, int, int]:
        """Backwards, then forwards, then W; of each the earlier microbatch first, and of that the later stage."""
        turn = {"W": 2, "F": 1}.get(action.kind, 0)
        return turn, action.microbatch, -self.stages[action.chunk]
