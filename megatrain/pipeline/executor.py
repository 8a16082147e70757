"""Runs any verified schedule on this rank's stage.

The executor knows nothing of the kind of schedule, of tensor parallelism or of the optimizer. It
holds input and output of each microbatch in flight, and moves tensors as the instructions say.
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
from megatrain.pipeline.p2p import P2PCommunicator, PendingReceive
from megatrain.pipeline.schedule import Action, Instruction, Message, P2POp, input_message


class Stage(nn.Module):
    """The layers of a rank: one or more chunks, each a list of layers."""

    def __init__(self, chunks: list[nn.ModuleList]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of all chunks in order."""
        return [layer for chunk in self.chunks for layer in chunk]  # type: ignore[attr-defined]

    def forward(
        self, hidden_states: HiddenStates | None, microbatch: Microbatch, chunk: int = 0
    ) -> HiddenStates | Tensor:
        for layer in self.chunks[chunk]:  # type: ignore[attr-defined]
            hidden_states = layer(hidden_states, microbatch)
        assert hidden_states is not None
        return hidden_states


class Backward(Protocol):
    """Runs autograd from a stage's output; `last` marks the last microbatch of the step."""

    def __call__(self, output: Tensor, grad: Tensor, *, last: bool) -> None: ...


class ActionTiming(NamedTuple):
    """Times of an action, by time.perf_counter; it waited for its input from `start` to `ready`."""

    action: Action
    start: float
    ready: float
    end: float


TimedPhase = Literal["other", "arrival", "F", "B", "I", "W"]
"""A phase that has just ended: waiting for an input, an action, or anything else."""


def no_timing(ended: TimedPhase) -> None:
    """Ignores the end of a phase; the default of `Executor.timing`."""


class Executor:
    """Runs instruction lists on a rank's stage.

    Args:
        stage: maps (hidden states, microbatch, chunk) to the next hidden states, or in the last
        stage
            to the summed loss of the microbatch.
        communicator: connection to the neighbouring ranks; None with one rank.
        hidden_shape: shape of the hidden states between stages.
        dtype: dtype of the hidden states.
        device: device of the stage.
        activity: records each action as it begins, and its input while it is missing.

    Attributes:
        action_timings: list to which each action's times are appended; None records nothing.
        timing: callback at the end of each phase.
    """

    def __init__(
        self,
        stage: Callable[[HiddenStates | None, Microbatch, int], HiddenStates | Tensor],
        *,
        communicator: P2PCommunicator | None,
        hidden_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        activity: RankActivity | None = None,
    ) -> None:
        self.stage = stage
        self.communicator = communicator
        self.activity = activity or RankActivity()
        self.hidden_shape = hidden_shape
        self.dtype = dtype
        self.device = device
        self.action_timings: list[ActionTiming] | None = None
        self.timing: Callable[[TimedPhase], None] = no_timing

    def run(
        self,
        instructions: Sequence[Instruction],
        microbatches: Sequence[Microbatch],
        *,
        backward: Backward | None,
        loss_weight: Tensor | None = None,
    ) -> list[Tensor]:
        """Runs all instructions of a step.

        Args:
            instructions: this rank's list of `communication.add_communication`.
            microbatches: the microbatches of the step.
            backward: runs autograd; None in evaluation, which keeps no activations.
            loss_weight: gradient of the step's loss with respect to a microbatch's summed loss.

        Returns:
            The summed loss of each microbatch on the rank of the last stage, an empty list on
            others.
        """
        backwards = sum(isinstance(i, Action) and i.kind in ("B", "I") for i in instructions)
        if self.device.type == "cpu":
            instructions = receives_first(instructions)
        step = _StepExecution(self, microbatches, backward, loss_weight, backwards)
        for instruction in instructions:
            if isinstance(instruction, P2POp):
                step.transfer(instruction)
            else:
                step.compute(instruction)
        if self.communicator is not None:
            self.activity.set("sending the last messages")
            self.communicator.finish()
        return step.losses


def receives_first(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Returns the instructions with all receives first, in order within each channel.

    For CPUs. A receive posted over gloo is a message to the sender, which wakes a thread there and
    can interrupt its computation. Posted together, receives cost at most half as much, data are
    sent without a request, and a send needs no action of its peer. Untouched receive buffers occupy
    no memory on CPUs. On GPUs they would, so receives stay in their places there.
    """

    def is_receive(instruction: Instruction) -> bool:
        return isinstance(instruction, P2POp) and instruction.direction == "receive"

    return sorted(instructions, key=lambda instruction: not is_receive(instruction))


class _InFlight(NamedTuple):
    input: Tensor | None
    output: Tensor


class _StepExecution:
    """State of one step between its instructions."""

    def __init__(
        self,
        executor: Executor,
        microbatches: Sequence[Microbatch],
        backward: Backward | None,
        loss_weight: Tensor | None,
        backwards: int,
    ) -> None:
        self.executor = executor
        self.microbatches = microbatches
        self.backward = backward
        self.loss_weight = loss_weight
        self.backwards_left = backwards
        self.losses: list[Tensor] = []
        self.output: Tensor | None = None
        """Output of the last action, consumed by the next transfer."""
        self.inputs: dict[Message, PendingReceive | Tensor] = {}
        self.in_flight: dict[tuple[int, int], _InFlight] = {}
        self.deferred: dict[tuple[int, int], list[DeferredWeightGrad]] = {}

    def transfer(self, op: P2POp) -> None:
        """Sends the last output, stores it locally, or posts a receive."""
        executor = self.executor
        if op.direction == "local":
            assert self.output is not None
            self.inputs[op.message] = self.output.detach()
            return
        assert executor.communicator is not None
        if op.direction == "receive":
            self.inputs[op.message] = executor.communicator.receive(
                executor.hidden_shape, executor.dtype, executor.device, op.peer
            )
        else:
            assert self.output is not None
            executor.communicator.send(self.output, op.peer)

    def compute(self, action: Action) -> None:
        """Waits for an action's input and runs the action."""
        timing = self.executor.timing
        timing("other")
        start = time.perf_counter()
        arrived = self._wait_for_input(action)
        ready = time.perf_counter()
        timing("arrival")
        self.executor.activity.set(action)
        if action.kind == "F":
            self.output = self._forward(action, arrived)
        elif action.kind == "W":
            compute_deferred_weight_grads(self.deferred.pop((action.microbatch, action.chunk)))
        else:
            self.output = self._backward(action, arrived)
        timing(action.kind)
        if self.executor.action_timings is not None:
            if self.executor.device.type == "cuda":
                torch.cuda.synchronize()
            self.executor.action_timings.append(
                ActionTiming(action, start, ready, time.perf_counter())
            )

    def _wait_for_input(self, action: Action) -> Tensor | None:
        """Returns the input of an action once it has arrived; None at the model's ends."""
        if action.kind == "W":
            return None
        message = input_message(action)
        arrival = self.inputs.pop(message, None)
        if not isinstance(arrival, PendingReceive):
            return arrival
        self.executor.activity.set_waiting_for(message, arrival.source)
        return arrival.wait()

    def _forward(self, action: Action, hidden: Tensor | None) -> Tensor | None:
        """Returns the output for the next stage; None in the last."""
        train = self.backward is not None
        if hidden is not None and train:
            hidden.requires_grad_()
        with torch.set_grad_enabled(train):
            hidden_states = None if hidden is None else HiddenStates(hidden)
            microbatch = self.microbatches[action.microbatch]
            result = self.executor.stage(hidden_states, microbatch, action.chunk)
        output = result if isinstance(result, Tensor) else result.hidden
        if train:
            self.in_flight[action.microbatch, action.chunk] = _InFlight(hidden, output)
        if isinstance(result, Tensor):
            self.losses.append(result.detach())
            return None
        return output

    def _backward(self, action: Action, arrived: Tensor | None) -> Tensor | None:
        """Returns the gradient for the previous stage; None in the first."""
        key = (action.microbatch, action.chunk)
        activation = self.in_flight.pop(key)
        gradient = arrived if arrived is not None else self.loss_weight
        assert gradient is not None
        assert self.backward is not None
        self.backwards_left -= 1
        last = self.backwards_left == 0
        deferred = self.deferred.setdefault(key, []) if action.kind == "I" else None
        if not activation.output.requires_grad:
            return None  # the first stage with all parameters frozen
        with defer_weight_grads(deferred) if deferred is not None else contextlib.nullcontext():
            self.backward(activation.output, gradient, last=last)
        return None if activation.input is None else activation.input.grad
