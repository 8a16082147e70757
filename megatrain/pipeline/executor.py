"""Runs a schedule: whatever list of actions passes the checker, on this rank's chunks of layers.

The executor knows nothing of which schedule it runs, of tensor ranks or of the optimizer. It holds, for each microbatch in
flight, what went in and what came out, and moves tensors as the instruction list says.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megatrain.distributed.activity import RankActivity
from megatrain.distributed.tensor_parallel import (
    DeferredWeightGrad,
    compute_deferred_weight_grads,
    defer_weight_grads,
)
from megatrain.models.microbatch import Microbatch
from megatrain.models.transformer import HiddenStates
from megatrain.pipeline.p2p import P2PCommunicator, PendingRecv
from megatrain.pipeline.schedule import Action, Instruction, Transfer, message


class Stage(nn.Module):
    """This rank's layers: one or more chunks, each a slice of the list of layers."""

    def __init__(self, chunks: list[nn.ModuleList]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    @property
    def layers(self) -> list[nn.Module]:
        """Of all chunks in turn."""
        return [layer for chunk in self.chunks for layer in chunk]  # type: ignore[attr-defined]

    def forward(
        self, hidden_states: HiddenStates | None, microbatch: Microbatch, chunk: int = 0
    ) -> HiddenStates | Tensor:
        for layer in self.chunks[chunk]:  # type: ignore[attr-defined]
            hidden_states = layer(hidden_states, microbatch)
        assert hidden_states is not None
        return hidden_states


class Backward(Protocol):
    """Runs autograd from a stage's output and takes in the gradients; `last` marks the step's last microbatch."""

    def __call__(self, output: Tensor, grad: Tensor, *, last: bool) -> None: ...


class ActionTiming(NamedTuple):
    """When an action ran, in seconds of time.perf_counter; from `start` to `ready` it waited for what it takes in."""

    action: Action
    start: float
    ready: float
    end: float


Lap = Literal["other", "arrival", "F", "B", "I", "W"]
"""What a rank has just ended: waiting for what an action takes in, an action, or anything else."""


def no_timing(ended: Lap) -> None:
    """Where nobody wants to know."""


class Executor:
    """Runs instruction lists over a rank's stage.

    Args:
        stage: maps (flow, context, chunk) to the next flow, or at the model's end to the microbatch's summed loss.
        channels: to the neighbouring ranks; unused with one rank.
        flow_shape: of the hidden tensor between stages.
        activity: where each action is noted as it begins, and what it waits for.
    """

    def __init__(
        self,
        stage: Callable[[HiddenStates | None, Microbatch, int], HiddenStates | Tensor],
        *,
        channels: P2PCommunicator | None,
        flow_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        activity: RankActivity | None = None,
    ) -> None:
        self.stage, self.channels, self.activity = stage, channels, activity or RankActivity()
        self.flow_shape, self.dtype, self.device = flow_shape, dtype, device
        self.records: list[ActionTiming] | None = None
        """While it is a list, each action adds its entry."""
        self.lap: Callable[[Lap], None] = no_timing
        """Told of each end, at once."""

    def run(
        self,
        instructions: Sequence[Instruction],
        microbatches: Sequence[Microbatch],
        *,
        backward: Backward | None,
        loss_weight: Tensor | None = None,
    ) -> list[Tensor]:
        """Do all instructions of one step.

        Args:
            contexts: by microbatch.
            backward: None in evaluation: nothing is kept then.
            loss_weight: gradient of the step's loss with respect to a microbatch's summed loss.

        Returns: the microbatches' summed losses on the rank of the last stage, nothing on the others.
        """
        backwards = sum(isinstance(i, Action) and i.kind in ("B", "I") for i in instructions)
        if self.device.type == "cpu":
            instructions = receives_first(instructions)
        run = _Run(self, microbatches, backward, loss_weight, backwards)
        for instruction in instructions:
            if isinstance(instruction, Transfer):
                run.move(instruction)
            else:
                run.compute(instruction)
        if self.channels is not None:
            self.activity.set("sending the last messages")
            self.channels.finish()
        return run.losses


def receives_first(instructions: Sequence[Instruction]) -> list[Instruction]:
    """All receives posted before anything else is done; each channel's stay in order.

    For CPUs: over gloo a posted receive is a message to the sender, which wakes a thread there and can interrupt its compute.
    All at once they cost half as much or less, data then come without being asked for, and a send needs nothing of its
    peer. Memory that no data have come to is not taken. On a GPU, where it would be, receives stay where they are.
    """

    def is_receive(instruction: Instruction) -> bool:
        return isinstance(instruction, Transfer) and instruction.direction == "receive"

    return sorted(instructions, key=lambda instruction: not is_receive(instruction))


class _InFlight(NamedTuple):
    entered: Tensor | None
    output: Tensor


class _Run:
    """One step, and what it holds between its instructions."""

    def __init__(
        self,
        executor: Executor,
        microbatches: Sequence[Microbatch],
        backward: Backward | None,
        loss_weight: Tensor | None,
        backwards: int,
    ) -> None:
        self.executor, self.microbatches, self.backward, self.loss_weight = (
            executor,
            microbatches,
            backward,
            loss_weight,
        )
        self.backwards_left = backwards
        self.losses: list[Tensor] = []
        self.made: Tensor | None = None
        """By the last action, for the transfer that stands behind it."""
        self.arrived: dict[tuple[str, int, int], PendingRecv | Tensor] = {}
        self.in_flight: dict[tuple[int, int], _InFlight] = {}
        self.deferred: dict[tuple[int, int], list[DeferredWeightGrad]] = {}

    def move(self, transfer: Transfer) -> None:
        executor, key = self.executor, (transfer.kind, transfer.microbatch, transfer.chunk)
        if transfer.direction == "keep":
            assert self.made is not None
            self.arrived[key] = self.made.detach()
            return
        assert executor.channels is not None
        if transfer.direction == "receive":
            self.arrived[key] = executor.channels.receive(
                executor.flow_shape, executor.dtype, executor.device, transfer.peer
            )
        else:
            assert self.made is not None
            executor.channels.send(self.made, transfer.peer)

    def compute(self, action: Action) -> None:
        lap = self.executor.lap
        lap("other")
        start = time.perf_counter()
        arrived = self._take(action)
        ready = time.perf_counter()
        lap("arrival")
        self.executor.activity.set(action)
        if action.kind == "F":
            self.made = self._forward(action, arrived)
        elif action.kind == "W":
            compute_deferred_weight_grads(self.deferred.pop((action.microbatch, action.chunk)))
        else:
            self.made = self._backward(action, arrived)
        lap(action.kind)
        if self.executor.records is not None:
            if self.executor.device.type == "cuda":
                torch.cuda.synchronize()
            self.executor.records.append(ActionTiming(action, start, ready, time.perf_counter()))

    def _take(self, action: Action) -> Tensor | None:
        """What has come for the action, once it is here; nothing at the model's ends."""
        if action.kind == "W":
            return None
        arrival = self.arrived.pop((message(action.kind), action.microbatch, action.chunk), None)
        if not isinstance(arrival, PendingRecv):
            return arrival
        self.executor.activity.set_waiting_for(
            action if action.kind != "I" else action._replace(kind="B"), arrival.source
        )
        return arrival.wait()

    def _forward(self, action: Action, entered: Tensor | None) -> Tensor | None:
        """What goes to the next stage."""
        keep = self.backward is not None
        if entered is not None and keep:
            entered.requires_grad_()
        with torch.set_grad_enabled(keep):
            hidden_states = None if entered is None else HiddenStates(entered)
            result = self.executor.stage(
                hidden_states, self.microbatches[action.microbatch], action.chunk
            )
        output = result if isinstance(result, Tensor) else result.hidden
        if keep:
            self.in_flight[action.microbatch, action.chunk] = _InFlight(entered, output)
        if isinstance(result, Tensor):
            self.losses.append(result.detach())
            return None
        return output

    def _backward(self, action: Action, arrived: Tensor | None) -> Tensor | None:
        """What goes to the stage before."""
        key = (action.microbatch, action.chunk)
        moved = self.in_flight.pop(key)
        gradient = arrived if arrived is not None else self.loss_weight
        assert gradient is not None
        assert self.backward is not None
        self.backwards_left -= 1
        last = self.backwards_left == 0
        deferred = self.deferred.setdefault(key, []) if action.kind == "I" else None
        if not moved.output.requires_grad:
            return None  # the first stage, all of it frozen
        with defer_weight_grads(deferred) if deferred is not None else contextlib.nullcontext():
            self.backward(moved.output, gradient, last=last)
        return None if moved.entered is None else moved.entered.grad
