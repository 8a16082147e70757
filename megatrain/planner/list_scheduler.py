"""Builds schedules for given times by greedy list scheduling, for stages of unequal cost.

Time advances from one start of an action to the next, on the rank that can start one first. Of the
actions whose inputs have arrived, the rank takes a backward before a forward, and both before
weight gradients (W), which fill bubbles. The number of activations is limited. A forward leaves
room for one activation of each later chunk of its rank, so that every microbatch can finish. For
2 ranks and 2 activations, with stage 1 twice as slow (F, I, W take 1 on stage 0 and 2 on stage 1):

    0  F0F1            I0  W0    I1W1
    1    F0  I0  F1  W0  I1  W1

The result is plain data, which the checker of schedules accepts like any other (verify.py).
"""

from __future__ import annotations

from typing import NamedTuple

from megatrain.pipeline.schedule import Action, Kind, Placement, Schedule, peak_activations
from megatrain.pipeline.simulator import Times


class SchedulingRules(NamedTuple):
    """Parameters of the greedy choice; the best values depend on the times.

    Attributes:
        max_microbatches: microbatches whose activations a rank may hold, over all its chunks.
        split: whether to split backwards into I and W.
        look_ahead: whether to defer a W that would end after the next action's arrival.
    """

    max_microbatches: int
    split: bool = True
    look_ahead: bool = False


def list_schedule(
    placement: Placement, microbatches: int, times: Times, rules: SchedulingRules
) -> Schedule:
    """Returns a schedule for these times."""
    ranks = [_Rank(rank, placement, microbatches, times, rules) for rank in range(placement.ranks)]
    first = placement.location(0)
    ranks[first.rank].arrive(
        [(0.0, Action("F", microbatch, first.chunk)) for microbatch in range(microbatches)]
    )
    starts: list[float | None] = [rank.next_start() for rank in ranks]
    while any(start is not None for start in starts):
        now, rank = min((start, rank) for rank, start in enumerate(starts) if start is not None)
        action, end = ranks[rank].run_best(now)
        target = placement.consumer(rank, action)
        if target is not None:
            kind: Kind = "F" if action.kind == "F" else ranks[rank].backward
            delay = times.send if target.rank != rank else 0.0
            ranks[target.rank].arrive(
                [(end + delay, Action(kind, action.microbatch, target.chunk))]
            )
            starts[target.rank] = ranks[target.rank].next_start()
        starts[rank] = ranks[rank].next_start()
    actions = [state.done for state in ranks]
    peaks = [peak_activations(rank_actions) for rank_actions in actions]
    return Schedule("list", placement, actions, peaks)


class _Rank:
    """State of a rank: pending actions with their arrival, activations, and actions done."""

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
        self.max_activations = rules.max_microbatches * placement.chunks
        self.idle_from, self.activations = 0.0, 0
        self.pending: list[tuple[float, Action]] = []
        self.done: list[Action] = []

    def arrive(self, actions: list[tuple[float, Action]]) -> None:
        """Adds pending actions, each with the time at which its input arrives."""
        self.pending += actions

    def next_start(self) -> float | None:
        """Returns the time of the next action that memory allows; None if there is none."""
        arrivals = [arrival for arrival, action in self.pending if self._fits(action)]
        if not arrivals:
            return None
        now = max(self.idle_from, min(arrivals))
        chosen = self._choose(now)
        return now if chosen is not None else self._next_arrival(now)

    def run_best(self, now: float) -> tuple[Action, float]:
        """Runs the best action that can start now; returns it and its end."""
        chosen = self._choose(now)
        assert chosen is not None, "the time is that of next_start"
        self.pending.remove(chosen)
        action = chosen[1]
        self.done.append(action)
        self.activations += action.kind == "F"
        self.activations -= action.kind in ("B", "W")
        self.idle_from = now + self.times.duration(action, self.stages[action.chunk])
        if action.kind == "F" and self.stages[action.chunk] == self.placement.stages - 1:
            self.pending.append((self.idle_from, action._replace(kind=self.backward)))
        if action.kind == "I":
            self.pending.append((self.idle_from, action._replace(kind="W")))
        return action, self.idle_from

    def _fits(self, action: Action) -> bool:
        """Returns True if a forward leaves room for one activation of each later chunk."""
        needed = self.activations + len(self.stages) - action.chunk
        return action.kind != "F" or needed <= self.max_activations

    def _choose(self, now: float) -> tuple[float, Action] | None:
        """Returns the action to start, with its arrival; None to wait for the next arrival."""
        ready = [item for item in self.pending if item[0] <= now and self._fits(item[1])]
        if not ready:
            return None
        best = min(ready, key=lambda item: self._priority(item[1]))
        action = best[1]
        if action.kind == "W" and self.rules.look_ahead:
            arrival = self._next_arrival(now)
            end = now + self.times.duration(action, self.stages[action.chunk])
            if arrival is not None and arrival < end:
                return None
        return best

    def _next_arrival(self, now: float) -> float | None:
        """Returns the next arrival of an action other than W that memory allows."""
        arrivals = (
            arrival
            for arrival, action in self.pending
            if arrival > now and action.kind != "W" and self._fits(action)
        )
        return min(arrivals, default=None)

    def _priority(self, action: Action) -> tuple[int, int, int]:
        """Orders backwards, forwards, W; then earlier microbatches; then later stages."""
        kind = {"W": 2, "F": 1}.get(action.kind, 0)
        return kind, action.microbatch, -self.stages[action.chunk]
