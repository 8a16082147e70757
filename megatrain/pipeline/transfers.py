"""Derives the sends and receives of a schedule, and proves that it cannot deadlock.

A forward's result goes to the next stage, a backward's to the one before. Each send stands right after the action that made
it; each receive as early as the order of arrivals allows, so that data travel while the rank computes: channels between
two ranks are first in, first out in each direction, so a receiver takes them in the sender's order.
"""

from __future__ import annotations

from collections import deque

from megatrain.pipeline.actions import Action, Instruction, Kind, Schedule, Transfer


def receives_of(action: Action, rank: int, ranks: int) -> Transfer | None:
    """What must arrive before the action."""
    peer = rank - 1 if action.kind == "F" else rank + 1
    if not 0 <= peer < ranks:
        return None
    return Transfer("receive", action.kind, action.microbatch, action.chunk, peer)


def sends_of(action: Action, rank: int, ranks: int) -> Transfer | None:
    """What leaves after the action."""
    peer = rank + 1 if action.kind == "F" else rank - 1
    if not 0 <= peer < ranks:
        return None
    return Transfer("send", action.kind, action.microbatch, action.chunk, peer)


def add_transfers(schedule: Schedule) -> list[list[Instruction]]:
    """Each rank's actions with their sends and receives; a receive is posted before the action that precedes its use.

        F0 F1 B0  ->  recv F0, recv F1, F0, send F0, recv B0, F1, send F1, B0, ...
    """
    return [_rank_instructions(actions, rank, len(schedule)) for rank, actions in enumerate(schedule)]


def _rank_instructions(actions: list[Action], rank: int, ranks: int) -> list[Instruction]:
    receives = [receives_of(action, rank, ranks) for action in actions]
    instructions: list[Instruction] = []
    if receives and receives[0] is not None:
        instructions.append(receives[0])
    for index, action in enumerate(actions):
        ahead = receives[index + 1] if index + 1 < len(actions) else None
        if ahead is not None:
            instructions.append(ahead)
        instructions.append(action)
        send = sends_of(action, rank, ranks)
        if send is not None:
            instructions.append(send)
    return instructions


class ScheduleError(AssertionError):
    """A schedule that is not legal: a mistake of whoever wrote it."""


def check_schedule(schedule: Schedule, microbatches: int, *, backward: bool = True) -> list[int]:
    """Prove a schedule legal and return each rank's peak number of live activations.

    Legal: every action of every microbatch exactly once, each backward after its forward, and all ranks reach the end
    when channels between ranks are first-in-first-out and a receive waits.
    """
    for rank, actions in enumerate(schedule):
        _check_complete(rank, actions, microbatches, backward)
    _check_progress(schedule)
    return [_peak(actions) for actions in schedule]


def _check_complete(rank: int, actions: list[Action], microbatches: int, backward: bool) -> None:
    kinds: tuple[Kind, ...] = ("F", "B") if backward else ("F",)
    expected = {Action(kind, i) for kind in kinds for i in range(microbatches)}
    if len(actions) != len(set(actions)):
        raise ScheduleError(f"rank {rank} does an action twice")
    if set(actions) != expected:
        missing = ", ".join(str(a) for a in sorted(expected - set(actions))) or "nothing"
        extra = ", ".join(str(a) for a in sorted(set(actions) - expected)) or "nothing"
        raise ScheduleError(f"rank {rank} lacks {missing} and has {extra} too much")
    place = {action: index for index, action in enumerate(actions)}
    for action in actions:
        if action.kind == "B" and place[action] < place[action._replace(kind="F")]:
            raise ScheduleError(f"rank {rank} does {action} before its forward")


def _check_progress(schedule: Schedule) -> None:
    """Run the instruction lists against FIFO channels until all are done or none can go on."""
    lists = [deque(instructions) for instructions in add_transfers(schedule)]
    channels: dict[tuple[int, int, Kind], deque[tuple[int, int]]] = {}
    expected: dict[int, list[Transfer]] = {rank: [] for rank in range(len(lists))}
    moved = True
    while moved:
        moved = False
        for rank, instructions in enumerate(lists):
            while instructions and _advance(rank, instructions[0], channels, expected[rank]):
                instructions.popleft()
                moved = True
    stuck = {rank: instructions[0] for rank, instructions in enumerate(lists) if instructions}
    if stuck:
        raise ScheduleError(f"deadlock: ranks wait for ever at {stuck}")


def _advance(rank: int, instruction: Instruction, channels: dict[tuple[int, int, Kind], deque[tuple[int, int]]],
             posted: list[Transfer]) -> bool:  # fmt: skip
    """Whether `rank` can do the instruction now; posting a receive never waits, using what it brings does."""
    if isinstance(instruction, Transfer):
        if instruction.direction == "receive":
            posted.append(instruction)
        else:
            key = (rank, instruction.peer, instruction.kind)
            channels.setdefault(key, deque()).append((instruction.microbatch, instruction.chunk))
        return True
    for transfer in list(posted):
        if (transfer.kind, transfer.microbatch, transfer.chunk) == instruction:
            channel = channels.get((transfer.peer, rank, transfer.kind), deque())
            if not channel:
                return False
            arrived = channel.popleft()
            if arrived != (transfer.microbatch, transfer.chunk):
                raise ScheduleError(f"rank {rank} waits for {instruction} and {arrived} arrives first")
            posted.remove(transfer)
    return True


def _peak(actions: list[Action]) -> int:
    live = peak = 0
    for action in actions:
        live += 1 if action.kind == "F" else -1
        peak = max(peak, live)
    return peak
