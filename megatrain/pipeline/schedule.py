"""Schedules, placements and instructions as plain data.

A schedule lists the actions of each rank: `F0 F1 B0 ...`, the forward or backward pass of one
microbatch through one of the rank's chunks. A chunk (Megatron's model chunk) holds the layers of
one virtual stage; the placement maps chunks to stages of the model. An instruction list is a rank's
actions with the sends and receives between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

Kind = Literal["F", "B", "I", "W"]
"""F forward; B backward; or its two parts: I input gradient, W weight gradients."""

Payload = Literal["F", "B"]
"""Tensors that stages exchange: activations (F) or their gradients (B)."""

Shape = Literal["loop", "v"]
"""Order in which chunks follow each other; see `Placement`."""

Direction = Literal["send", "receive", "local"]

_ACTION = re.compile(r"([FBIW])(\d{1,9})(?:\.(\d{1,9}))?")


class Action(NamedTuple):
    """Computation of one microbatch in one chunk; `str` gives `F0`, or `F0.1` for chunk 1."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


def parse_action(text: str) -> Action | None:
    """Returns the action that `str` writes as `text`, or None if there is none."""
    match = _ACTION.fullmatch(text)
    if match is None:
        return None
    return Action(cast(Kind, match[1]), int(match[2]), int(match[3] or 0))


class Message(NamedTuple):
    """A tensor between two stages, named after the action that consumes it."""

    payload: Payload
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return str(Action(*self))


class P2POp(NamedTuple):
    """A send or receive.

    `local` is a message from a rank to itself: the output of the last action is stored, not sent.
    """

    direction: Direction
    message: Message
    peer: int

    def __str__(self) -> str:
        preposition = "from" if self.direction == "receive" else "to"
        return f"{self.direction} {self.message} {preposition} rank {self.peer}"


Instruction = Action | P2POp


class StageLocation(NamedTuple):
    """Rank and chunk of a stage."""

    rank: int
    chunk: int


class Placement(NamedTuple):
    """Maps the chunks of all ranks to stages; stage 0 has the model's first layers.

    `loop` passes through the ranks in the same order for each chunk. `v` turns round after each
    chunk, so that the two stages at the turning point are on one rank. For 4 ranks with 2 chunks
    each:

        rank           0  1  2  3            rank        0  1  2  3
        loop, chunk 0  0  1  2  3            v, chunk 0  0  1  2  3
        loop, chunk 1  4  5  6  7            v, chunk 1  7  6  5  4
    """

    ranks: int
    chunks: int = 1
    shape: Shape = "loop"

    @property
    def stages(self) -> int:
        """Number of stages of the model."""
        return self.ranks * self.chunks

    def stage(self, rank: int, chunk: int) -> int:
        """Returns the stage of a rank's chunk."""
        return chunk * self.ranks + (self.ranks - 1 - rank if self._is_reversed(chunk) else rank)

    def stages_of(self, rank: int) -> list[int]:
        """Returns the stages of a rank, by chunk."""
        return [self.stage(rank, chunk) for chunk in range(self.chunks)]

    def location(self, stage: int) -> StageLocation:
        """Returns rank and chunk of a stage; the inverse of `stage`."""
        chunk, position = divmod(stage, self.ranks)
        rank = self.ranks - 1 - position if self._is_reversed(chunk) else position
        return StageLocation(rank, chunk)

    def producer(self, rank: int, action: Action) -> StageLocation | None:
        """Returns the stage that computes an action's input; None for W and at the model's ends."""
        return self._neighbour(rank, action, forward=-1, backward=+1)

    def consumer(self, rank: int, action: Action) -> StageLocation | None:
        """Returns the stage that needs an action's output; None for W and at the model's ends."""
        return self._neighbour(rank, action, forward=+1, backward=-1)

    def _is_reversed(self, chunk: int) -> bool:
        return self.shape == "v" and chunk % 2 == 1

    def _neighbour(
        self, rank: int, action: Action, *, forward: int, backward: int
    ) -> StageLocation | None:
        if action.kind == "W":
            return None
        stage = self.stage(rank, action.chunk) + (forward if action.kind == "F" else backward)
        return self.location(stage) if 0 <= stage < self.stages else None


@dataclass(frozen=True)
class Schedule:
    """The actions of each rank in order, and the activations that each rank holds at most.

    An activation is that of one microbatch in one chunk, held from its forward pass until its B or
    W is done. `peaks` are the declared limits; `megatrain.pipeline.verify` proves them.
    """

    name: str
    placement: Placement
    actions: list[list[Action]]
    """By rank."""
    peaks: list[int]
    """By rank."""

    @property
    def microbatches(self) -> int:
        """Number of microbatches."""
        return 1 + max(action.microbatch for actions in self.actions for action in actions)


def payload_of(kind: Kind) -> Payload:
    """Returns the payload of an action's input and output: activations for F, else gradients."""
    return "F" if kind == "F" else "B"


def input_message(action: Action) -> Message:
    """Returns the message that an action consumes."""
    return Message(payload_of(action.kind), action.microbatch, action.chunk)


def live_activations(actions: list[Action]) -> Iterator[int]:
    """Yields the number of activations held while each action runs."""
    live = 0
    for action in actions:
        live += action.kind == "F"
        yield live
        live -= action.kind in ("B", "W")


def peak_activations(actions: list[Action]) -> int:
    """Returns the largest number of activations held at once."""
    return max(live_activations(actions), default=0)
