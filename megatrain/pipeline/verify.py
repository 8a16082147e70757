"""Proves that a schedule is legal: complete, ordered, within its peaks, free of deadlocks."""

from __future__ import annotations

from collections import Counter, deque

from megatrain.pipeline.communication import Channel, add_communication
from megatrain.pipeline.schedule import (
    Action,
    Instruction,
    Kind,
    Message,
    Placement,
    Schedule,
    input_message,
    peak_activations,
)


class ScheduleError(AssertionError):
    """A schedule that is not legal."""


_SPLIT_BACKWARD: tuple[Kind, ...] = ("I", "W")
_PREDECESSOR: dict[Kind, Kind] = {"B": "F", "I": "F", "W": "I"}


def check_schedule(schedule: Schedule, microbatches: int, *, backward: bool = True) -> list[int]:
    """Proves that a schedule is legal and returns the peak number of live activations of each rank.

    A legal schedule has every action of every microbatch and chunk exactly once, each backward
    after its forward and each W after its I. No rank holds more activations than declared, and all
    ranks reach the end (`check_instructions`).

    Args:
        schedule: the schedule to check.
        microbatches: number of microbatches that it must process.
        backward: False for schedules of forward passes only.

    Returns: the peak of each rank.

    Raises:
        ScheduleError: with the first violation.
    """
    if len(schedule.actions) != schedule.placement.ranks:
        raise ScheduleError(
            f"actions for {len(schedule.actions)} ranks; expected {schedule.placement.ranks}"
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
    """Raises if an action is missing, repeated or unexpected.

    The backward of a microbatch through a chunk is either B, or I and W.
    """
    count = Counter(actions)
    for action, times in count.items():
        if times > 1:
            raise ScheduleError(f"rank {rank}: {action} occurs {times} times")
    expected: set[Action] = set()
    for microbatch in range(microbatches):
        for chunk in range(chunks):
            split = any(Action(kind, microbatch, chunk) in count for kind in _SPLIT_BACKWARD)
            kinds: tuple[Kind, ...] = _SPLIT_BACKWARD if split else ("B",)
            expected |= {Action(k, microbatch, chunk) for k in ("F", *(kinds if backward else ()))}
    missing, unexpected = expected - set(count), set(count) - expected
    if missing or unexpected:
        found = {"missing": missing, "unexpected": unexpected}
        parts = [f"{name} {_format_actions(actions)}" for name, actions in found.items() if actions]
        raise ScheduleError(f"rank {rank}: {'; '.join(parts)}")


def _format_actions(actions: set[Action]) -> str:
    names = [str(action) for action in sorted(actions)[:8]]
    return ", ".join([*names, "..."] if len(actions) > 8 else names)


def _check_order(rank: int, actions: list[Action]) -> None:
    done: set[Action] = set()
    for action in actions:
        if action.kind in _PREDECESSOR:
            before = action._replace(kind=_PREDECESSOR[action.kind])
            if before not in done:
                raise ScheduleError(f"rank {rank}: {action} precedes {before}")
        done.add(action)


def _check_peaks(peaks: list[int], declared: list[int]) -> None:
    for rank, (peak, limit) in enumerate(zip(peaks, declared, strict=True)):
        if peak > limit:
            raise ScheduleError(f"rank {rank}: holds {peak} activations, declared at most {limit}")


def check_instructions(instructions: list[list[Instruction]], placement: Placement) -> None:
    """Executes instruction lists with first-in-first-out channels until all are done or blocked.

    Sends and posting receives never block; an action blocks until its input has arrived. Each
    receive must match the next message of its channel, and every message must be received and
    consumed.

    Raises:
        ScheduleError: on a deadlock, a mismatch or an unused message.
    """
    ranks = [_RankState(rank, instructions[rank], placement) for rank in range(placement.ranks)]
    channels: dict[Channel, deque[Message]] = {}
    progress = True
    while progress:
        progress = sum(rank.advance(channels) for rank in ranks) > 0
    blocked = [f"rank {rank.rank} is blocked on {rank.left[0]}" for rank in ranks if rank.left]
    if blocked:
        raise ScheduleError("deadlock: " + ", ".join(blocked))
    for rank in ranks:
        if unused := rank.unused():
            raise ScheduleError(f"rank {rank.rank}: {', '.join(map(str, unused))} is never used")
    for (source, target), channel in channels.items():
        if channel:
            raise ScheduleError(f"rank {target} never receives {channel[0]} from rank {source}")


class _RankState:
    """Progress of one rank through its instructions."""

    def __init__(self, rank: int, instructions: list[Instruction], placement: Placement) -> None:
        self.rank = rank
        self.placement = placement
        self.left = deque(instructions)
        self.posted: dict[int, deque[Message]] = {}
        """Pending receives by peer."""
        self.available: list[Message] = []
        """Messages that arrived or were stored locally, and are not consumed yet."""

    def advance(self, channels: dict[Channel, deque[Message]]) -> bool:
        """Executes instructions until one blocks; returns True if any was executed."""
        before = len(self.left)
        while self.left and self._execute(self.left[0], channels):
            self.left.popleft()
        return len(self.left) < before

    def unused(self) -> list[Message]:
        """Returns messages that were posted or arrived and that no action consumed."""
        return [
            *self.available,
            *(message for posted in self.posted.values() for message in posted),
        ]

    def _execute(self, instruction: Instruction, channels: dict[Channel, deque[Message]]) -> bool:
        """Returns False if the instruction blocks."""
        if isinstance(instruction, Action):
            return self._consume(instruction, channels)
        if instruction.direction == "receive":
            self.posted.setdefault(instruction.peer, deque()).append(instruction.message)
        elif instruction.direction == "local":
            self.available.append(instruction.message)
        else:
            channel = channels.setdefault((self.rank, instruction.peer), deque())
            channel.append(instruction.message)
        return True

    def _consume(self, action: Action, channels: dict[Channel, deque[Message]]) -> bool:
        """Consumes the input of an action; returns False if it has not arrived.

        All messages that were posted earlier on the same channel arrive first.
        """
        producer = self.placement.producer(self.rank, action)
        if producer is None:
            return True
        message = input_message(action)
        posted = self.posted.get(producer.rank, deque())
        channel = channels.get((producer.rank, self.rank), deque())
        while message not in self.available and posted and channel:
            expected, arrived = posted.popleft(), channel.popleft()
            if arrived != expected:
                raise ScheduleError(
                    f"rank {self.rank}: expects {expected} from rank {producer.rank}, "
                    f"but {arrived} arrives"
                )
            self.available.append(arrived)
        if message not in self.available:
            return False
        self.available.remove(message)
        return True
