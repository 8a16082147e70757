"""What a rank does in a pipeline, as plain data.

A schedule is a list of actions for each rank: `F0 F1 B0 ...`, the forward or backward of one microbatch through one of the
rank's chunks of layers, and a placement that says which stage of the model each chunk is. An instruction list is a rank's
actions with the sends and receives between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]
"""F forward; B backward; or a backward in two parts: I for the gradient of the input, W for those of the weights."""

Message = Literal["F", "B"]
"""What flows between stages: activations on the way forward (F), their gradients on the way back (B)."""

Direction = Literal["send", "receive", "keep"]


class Action(NamedTuple):
    """Something that a rank computes: one microbatch through one chunk of its layers."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


class Transfer(NamedTuple):
    """A message that leaves for, or comes from, a peer.

    `microbatch` and `chunk` are those of the action that the receiver does with it. `keep` is a message from a rank to
    itself: nothing is sent, what the last action made is put aside for the one that takes it in.
    """

    direction: Direction
    kind: Message
    microbatch: int
    chunk: int
    peer: int

    def __str__(self) -> str:
        what = Action(self.kind, self.microbatch, self.chunk)
        return (
            f"{self.direction} {what} "
            + ("from" if self.direction == "receive" else "to")
            + f" rank {self.peer}"
        )


Instruction = Action | Transfer


class StageLocation(NamedTuple):
    """Where a stage lives."""

    rank: int
    chunk: int


class Placement(NamedTuple):
    """Which stage of the model each chunk of each rank is; stages count from the model's first layers.

    A loop goes through the ranks in the same order again for each chunk; a v turns round, so that the turning point's two
    stages are neighbours on one rank. For 4 ranks with 2 chunks each:

        rank           0  1  2  3            rank        0  1  2  3
        loop, chunk 0  0  1  2  3            v, chunk 0  0  1  2  3
        loop, chunk 1  4  5  6  7            v, chunk 1  7  6  5  4
    """

    ranks: int
    chunks: int = 1
    shape: Literal["loop", "v"] = "loop"

    @property
    def stages(self) -> int:
        """Stages of the whole model."""
        return self.ranks * self.chunks

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that is this rank's chunk."""
        return chunk * self.ranks + (self.ranks - 1 - rank if self._returns(chunk) else rank)

    def stages_of(self, rank: int) -> list[int]:
        """This rank's stages, by chunk."""
        return [self.stage(rank, chunk) for chunk in range(self.chunks)]

    def place(self, stage: int) -> StageLocation:
        """Where a stage lives; the inverse of `stage`."""
        chunk, position = divmod(stage, self.ranks)
        return StageLocation(self.ranks - 1 - position if self._returns(chunk) else position, chunk)

    def taken_from(self, rank: int, action: Action) -> StageLocation | None:
        """Who makes what the action takes in; None for W and at the model's ends."""
        return self._neighbour(rank, action, forward=-1, backward=+1)

    def given_to(self, rank: int, action: Action) -> StageLocation | None:
        """Who takes in what the action makes; None for W and at the model's ends."""
        return self._neighbour(rank, action, forward=+1, backward=-1)

    def _returns(self, chunk: int) -> bool:
        return self.shape == "v" and chunk % 2 == 1

    def _neighbour(
        self, rank: int, action: Action, *, forward: int, backward: int
    ) -> StageLocation | None:
        if action.kind == "W":
            return None
        stage = self.stage(rank, action.chunk) + (forward if action.kind == "F" else backward)
        return self.place(stage) if 0 <= stage < self.stages else None


@dataclass(frozen=True)
class Schedule:
    """Each rank's actions in order, and the most activations that it says each rank holds.

    An activation is one microbatch's in one chunk, held from its forward until its backward, or its W, is done.
    """

    name: str
    placement: Placement
    actions: list[list[Action]]
    """By rank."""
    peaks: list[int]
    """By rank."""


def message(kind: Kind) -> Message:
    """The message that an action takes in and makes: activations for F, gradients for B and I."""
    return "F" if kind == "F" else "B"


def live_activations(actions: list[Action]) -> Iterator[int]:
    """How many activations are held while each action runs."""
    live = 0
    for action in actions:
        live += action.kind == "F"
        yield live
        live -= action.kind in ("B", "W")


def peak_activations(actions: list[Action]) -> int:
    """The most activations held at once."""
    return max(live_activations(actions), default=0)
