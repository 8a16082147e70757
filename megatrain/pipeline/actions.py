"""What a rank does in a pipeline, as plain data.

A schedule is a list of actions for each rank: `F0 F1 B0 ...`, the forward or backward of one microbatch through one of the
rank's chunks of layers. An instruction list is the same with the sends and receives between them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["F", "B"]


class Action(NamedTuple):
    """Forward (F) or backward (B) of a microbatch through a chunk of this rank's layers."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


class Transfer(NamedTuple):
    """Send to or receive from a peer: activations on the way forward (F), their gradients on the way back (B).

    `microbatch` and `chunk` are those of the action that the receiver does with it.
    """

    direction: Literal["send", "receive"]
    kind: Kind
    microbatch: int
    chunk: int
    peer: int


Instruction = Action | Transfer
Schedule = list[list[Action]]
"""Actions by pipeline rank."""
