"""Runs a schedule: whatever list of actions passes the checker, on this rank's stage.

The executor knows nothing of which schedule it runs, of tensor ranks or of the optimizer. It holds, for each microbatch in
flight, what went in and what came out, and moves tensors as the instruction list says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megatrain.models.context import Context
from megatrain.models.decoder import Flow
from megatrain.pipeline.actions import Action, Instruction, Transfer
from megatrain.pipeline.channels import Arrival, Channels


class Stage(nn.Module):
    """This rank's slice of the list of layers."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, flow: Flow | None, context: Context) -> Flow | Tensor:
        for layer in self.layers:
            flow = layer(flow, context)
        assert flow is not None
        return flow


class Backward(Protocol):
    """Runs autograd from a stage's output and takes in the gradients; `last` marks the step's last microbatch."""

    def __call__(self, output: Tensor, grad: Tensor, *, last: bool) -> None: ...


class _InFlight(NamedTuple):
    entered: Tensor | None
    output: Tensor


class Executor:
    """Runs instruction lists over one stage.

    Args:
        stage: maps (flow, context) to the next flow, or on the last stage to the microbatch's summed loss.
        channels: to the neighbouring stages; unused with one stage.
        flow_shape: of the hidden tensor between stages.
    """

    def __init__(self, stage: Callable[[Flow | None, Context], Flow | Tensor], *, channels: Channels | None,
                 flow_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:  # fmt: skip
        self.stage, self.channels = stage, channels
        self.flow_shape, self.dtype, self.device = flow_shape, dtype, device

    def run(self, instructions: Sequence[Instruction], contexts: Sequence[Context], *, backward: Backward | None,
            loss_weight: Tensor | None = None) -> list[Tensor]:  # fmt: skip
        """Do all instructions of one step.

        Args:
            contexts: by microbatch.
            backward: None in evaluation: nothing is kept then.
            loss_weight: gradient of the step's loss with respect to a microbatch's summed loss.

        Returns: the microbatches' summed losses on the last stage, nothing on the others.
        """
        arrivals: dict[tuple[str, int], Arrival] = {}
        in_flight: dict[int, _InFlight] = {}
        ready: dict[tuple[str, int], Tensor] = {}
        losses: list[Tensor] = []
        backwards_left = sum(isinstance(i, Action) and i.kind == "B" for i in instructions)
        for instruction in instructions:
            key = (instruction.kind, instruction.microbatch)
            if isinstance(instruction, Transfer):
                assert self.channels is not None
                if instruction.direction == "receive":
                    arrivals[key] = self.channels.receive(self.flow_shape, self.dtype, self.device, instruction.peer)
                else:
                    self.channels.send(ready.pop(key), instruction.peer)
                continue
            arrived = arrivals.pop(key).wait() if key in arrivals else None
            if instruction.kind == "F":
                moved = self._forward(arrived, contexts[instruction.microbatch], keep=backward is not None)
                if isinstance(moved.output, Tensor) and moved.output.dim() == 0:
                    losses.append(moved.output.detach())
                else:
                    ready[key] = moved.output
                if backward is not None:
                    in_flight[instruction.microbatch] = moved
            else:
                assert backward is not None
                backwards_left -= 1
                gradient = self._backward(in_flight.pop(instruction.microbatch), arrived, backward, loss_weight, backwards_left == 0)
                if gradient is not None:
                    ready[key] = gradient
        if self.channels is not None:
            self.channels.finish()
        return losses

    def _forward(self, arrived: Tensor | None, context: Context, *, keep: bool) -> _InFlight:
        with torch.set_grad_enabled(keep):
            if arrived is not None and keep:
                arrived.requires_grad_()
            result = self.stage(None if arrived is None else Flow(arrived), context)
        return _InFlight(arrived, result if isinstance(result, Tensor) else result.hidden)

    def _backward(self, moved: _InFlight, arrived: Tensor | None, backward: Backward, loss_weight: Tensor | None,
                  last: bool) -> Tensor | None:  # fmt: skip
        gradient = arrived if arrived is not None else loss_weight
        assert gradient is not None
        backward(moved.output, gradient, last=last)
        return None if moved.entered is None else moved.entered.grad
