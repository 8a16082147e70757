"""Derives the sends and receives of a schedule, and proves that it is legal and cannot deadlock.

A forward's result goes to the next stage, a backward's gradient to the one before. Each send stands right after the action
that made it; each receive as early as the order of arrivals allows, so that data travel while the rank computes. All
messages from one rank to another share one channel, first in, first out, so a receiver takes them in the sender's order.
Where the next stage is the rank's own, nothing is sent: the result is kept.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from megatrain.pipeline.schedule import (
    Action,
    Direction,
    Instruction,
    Kind,
    Message,
    Placement,
    Schedule,
    Transfer,
    message,
    peak_activations,
)


class ScheduleError(AssertionError):
    """A schedule that is not legal: a mistake of whoever wrote it."""


class _Letter(NamedTuple):
    """A message as its receiver knows it: what it is and the action's microbatch and chunk."""

    kind: Message
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return str(Action(*self))


Channel = tuple[int, int]
"""From a rank, to a rank."""


# -- sends and receives ------------------------------------------------------------------------------------------------


def add_communication(schedule: Schedule) -> list[list[Instruction]]:
    """Each rank's actions with their sends and receives; a receive is posted before the action that precedes its use.

        F0 F1 B0  ->  receive F0, receive F1, F0, send F0, receive B0, F1, send F1, B0, send B0, ...

    Where a sender's order is not the receiver's, the receives of what comes first are posted as early as that asks for.
    The schedule must hold each action once.
    """
    channels = _channels(schedule)
    return [_rank_instructions(schedule, rank, channels) for rank in range(len(schedule.actions))]


def _channels(schedule: Schedule) -> dict[Channel, list[_Letter]]:
    """What each channel carries, in the sender's order."""
    channels: dict[Channel, list[_Letter]] = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            target = schedule.placement.given_to(rank, action)
            if target is not None and target.rank != rank:
                letter = _Letter(message(action.kind), action.microbatch, target.chunk)
                channels.setdefault((rank, target.rank), []).append(letter)
    return channels


def _rank_instructions(
    schedule: Schedule, rank: int, channels: dict[Channel, list[_Letter]]
) -> list[Instruction]:
    actions = schedule.actions[rank]
    posts = _posts(actions, rank, channels)
    instructions: list[Instruction] = []
    for index, action in enumerate(actions):
        instructions += posts.get(index, [])
        instructions.append(action)
        target = schedule.placement.given_to(rank, action)
        if target is not None:
            direction: Direction = "keep" if target.rank == rank else "send"
            instructions.append(
                Transfer(
                    direction, message(action.kind), action.microbatch, target.chunk, target.rank
                )
            )
    return instructions


def _posts(
    actions: list[Action], rank: int, channels: dict[Channel, list[_Letter]]
) -> dict[int, list[Transfer]]:
    """The receives to post before each action, by its index."""
    use = {
        _Letter(message(a.kind), a.microbatch, a.chunk): i
        for i, a in enumerate(actions)
        if a.kind != "W"
    }
    posts: dict[int, list[Transfer]] = {}
    for (source, target), letters in sorted(channels.items()):
        if target != rank:
            continue
        latest = len(actions)
        received = []
        for letter in reversed(letters):
            latest = min(latest, max(use[letter] - 1, 0))
            received.append((latest, Transfer("receive", *letter, source)))
        for index, transfer in reversed(received):
            posts.setdefault(index, []).append(transfer)
    return posts


# -- the proof ---------------------------------------------------------------------------------------------------------


_WHOLE: tuple[Kind, ...] = ("B",)
_SPLIT: tuple[Kind, ...] = ("I", "W")
_AFTER: dict[Kind, Kind] = {"B": "F", "I": "F", "W": "I"}


def check_schedule(schedule: Schedule, microbatches: int, *, backward: bool = True) -> list[int]:
    """Prove a schedule legal and return each rank's peak number of live activations.

    Legal: every action of every microbatch and chunk exactly once, each backward after its forward and each W after its I,
    never more activations held than the schedule declares, and all ranks reach the end (`check_instructions`).
    Raises ScheduleError, which says what is wrong first.
    """
    if len(schedule.actions) != schedule.placement.ranks:
        raise ScheduleError(
            f"there are actions for {len(schedule.actions)} ranks and not {schedule.placement.ranks}"
        )
    for rank, actions in enumerate(schedule.actions):
        _check_complete(rank, actions, microbatches, schedule.placement.chunks, backward)
        _check_order(rank, actions)
    peaks = [peak_activations(actions) for actions in schedule.actions]
    if backward:
        _check_peaks(peaks, schedule.peaks)
    check_instructions(add_communication(schedule), schedule.placement)
    return peaks


def _check_complete(
    rank: int, actions: list[Action], microbatches: int, chunks: int, backward: bool
) -> None:
    """A microbatch's backward through a chunk is either B, or I and W."""
    count = Counter(actions)
    for action, times in count.items():
        if times > 1:
            raise ScheduleError(f"rank {rank} does {action} {times} times")
    expected: set[Action] = set()
    for microbatch in range(microbatches):
        for chunk in range(chunks):
            split = any(Action(kind, microbatch, chunk) in count for kind in _SPLIT)
            kinds: tuple[Kind, ...] = ("F", *(_SPLIT if split else _WHOLE)) if backward else ("F",)
            expected |= {Action(kind, microbatch, chunk) for kind in kinds}
    if set(count) != expected:
        raise ScheduleError(
            f"rank {rank} lacks {_listed(expected - set(count))} and has {_listed(set(count) - expected)} too much"
        )


def _listed(actions: set[Action]) -> str:
    shown = [str(action) for action in sorted(actions)[:8]] + (["..."] if len(actions) > 8 else [])
    return ", ".join(shown) or "nothing"


def _check_order(rank: int, actions: list[Action]) -> None:
    done: set[Action] = set()
    for action in actions:
        if action.kind in _AFTER and action._replace(kind=_AFTER[action.kind]) not in done:
            raise ScheduleError(
                f"rank {rank} does {action} before {action._replace(kind=_AFTER[action.kind])}"
            )
        done.add(action)


def _check_peaks(peaks: list[int], declared: list[int]) -> None:
    for rank, (peak, most) in enumerate(zip(peaks, declared, strict=True)):
        if peak > most:
            raise ScheduleError(f"rank {rank} holds {peak} activations and declares at most {most}")


def check_instructions(instructions: list[list[Instruction]], placement: Placement) -> None:
    """Run the instruction lists against first-in-first-out channels until all are done or none can go on.

    A send never waits, nor does posting a receive; an action waits until what it takes in has arrived. Each receive is
    for the message that its channel brings next, and nothing is left on the way.
    """
    ranks = [_Rank(rank, instructions[rank], placement) for rank in range(placement.ranks)]
    channels: dict[Channel, deque[_Letter]] = {}
    moved = True
    while moved:
        # Every rank in each round.
        moved = sum(rank.advance(channels) for rank in ranks) > 0
    waiting = [f"rank {rank.rank} waits for ever at {rank.left[0]}" for rank in ranks if rank.left]
    if waiting:
        raise ScheduleError("deadlock: " + ", ".join(waiting))
    for rank in ranks:
        if rank.unused():
            raise ScheduleError(
                f"rank {rank.rank} receives {', '.join(map(str, rank.unused()))} and does nothing with it"
            )
    for (source, target), channel in channels.items():
        if channel:
            raise ScheduleError(
                f"rank {source} sends {channel[0]} and rank {target} never receives it"
            )


class _Rank:
    """A rank that works through its instructions."""

    def __init__(self, rank: int, instructions: list[Instruction], placement: Placement) -> None:
        self.rank, self.placement = rank, placement
        self.left = deque(instructions)
        self.posted: dict[int, deque[_Letter]] = {}
        """Receives not yet filled, by peer."""
        self.here: list[_Letter] = []
        """What arrived, or was kept, and is not yet used."""

    def advance(self, channels: dict[Channel, deque[_Letter]]) -> bool:
        """Go on as far as possible; whether that was a step at all."""
        before = len(self.left)
        while self.left and self._do(self.left[0], channels):
            self.left.popleft()
        return len(self.left) < before

    def unused(self) -> list[_Letter]:
        """What was posted or arrived and no action took in."""
        return [*self.here, *(letter for letters in self.posted.values() for letter in letters)]

    def _do(self, instruction: Instruction, channels: dict[Channel, deque[_Letter]]) -> bool:
        """Whether the instruction could be done."""
        if isinstance(instruction, Action):
            return self._take_in(instruction, channels)
        letter = _Letter(instruction.kind, instruction.microbatch, instruction.chunk)
        if instruction.direction == "receive":
            self.posted.setdefault(instruction.peer, deque()).append(letter)
        elif instruction.direction == "keep":
            self.here.append(letter)
        else:
            channels.setdefault((self.rank, instruction.peer), deque()).append(letter)
        return True

    def _take_in(self, action: Action, channels: dict[Channel, deque[_Letter]]) -> bool:
        """Whether what the action needs is here: it comes after all that was posted before it on its channel."""
        source = self.placement.taken_from(self.rank, action)
        if source is None:
            return True
        letter = _Letter(message(action.kind), action.microbatch, action.chunk)
        posted = self.posted.get(source.rank, deque())
        channel = channels.get((source.rank, self.rank), deque())
        while letter not in self.here and posted and channel:
            expected, arrived = posted.popleft(), channel.popleft()
            if arrived != expected:
                raise ScheduleError(
                    f"rank {self.rank} is to receive {expected} from rank {source.rank} and {arrived} arrives"
                )
            self.here.append(arrived)
        if letter not in self.here:
            return False
        self.here.remove(letter)
        return True
