"""Derives the sends and receives of a schedule.

The result of a forward goes to the next stage, the gradient of a backward to the previous one. Each
send follows the action that computed the tensor. Each receive is posted as early as the order of
arrivals allows, so that transfers overlap with computation. All messages from one rank to another
share one first-in-first-out channel, so a receiver posts its receives in the sender's order.
Results for a stage on the same rank are stored locally.
"""

from __future__ import annotations

from megatrain.pipeline.schedule import (
    Action,
    Instruction,
    Message,
    P2POp,
    Schedule,
    input_message,
    payload_of,
)

Channel = tuple[int, int]
"""Sending and receiving rank."""


def add_communication(schedule: Schedule) -> list[list[Instruction]]:
    """Returns the instructions of each rank: its actions with their sends and receives.

    A receive is posted before the action that precedes its use:

        F0 F1 B0  ->  receive F0, receive F1, F0, send F0, receive B0, F1, send F1, B0, send B0, ...

    If a receiver consumes messages in another order than they are sent, receives of earlier
    messages are posted earlier. Each action must occur once.
    """
    channels = _messages_by_channel(schedule)
    return [_rank_instructions(schedule, rank, channels) for rank in range(len(schedule.actions))]


def _messages_by_channel(schedule: Schedule) -> dict[Channel, list[Message]]:
    """Returns the messages of each channel in the sender's order."""
    channels: dict[Channel, list[Message]] = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            op = _output_op(schedule, rank, action)
            if op is not None and op.direction == "send":
                channels.setdefault((rank, op.peer), []).append(op.message)
    return channels


def _rank_instructions(
    schedule: Schedule, rank: int, channels: dict[Channel, list[Message]]
) -> list[Instruction]:
    actions = schedule.actions[rank]
    receives = _receives(actions, rank, channels)
    instructions: list[Instruction] = []
    for index, action in enumerate(actions):
        instructions += [*receives.get(index, []), action]
        op = _output_op(schedule, rank, action)
        if op is not None:
            instructions.append(op)
    return instructions


def _output_op(schedule: Schedule, rank: int, action: Action) -> P2POp | None:
    """Returns the transfer of an action's output, or None if no stage needs it."""
    consumer = schedule.placement.consumer(rank, action)
    if consumer is None:
        return None
    message = Message(payload_of(action.kind), action.microbatch, consumer.chunk)
    return P2POp("local" if consumer.rank == rank else "send", message, consumer.rank)


def _receives(
    actions: list[Action], rank: int, channels: dict[Channel, list[Message]]
) -> dict[int, list[P2POp]]:
    """Returns the receives to post before each action, by the action's index."""
    uses = {input_message(a): index for index, a in enumerate(actions) if a.kind != "W"}
    receives: dict[int, list[P2POp]] = {}
    for (source, target), messages in sorted(channels.items()):
        if target != rank:
            continue
        latest = len(actions)
        posts = []
        for message in reversed(messages):
            latest = min(latest, max(uses[message] - 1, 0))
            posts.append((latest, P2POp("receive", message, source)))
        for index, op in reversed(posts):
            receives.setdefault(index, []).append(op)
    return receives
