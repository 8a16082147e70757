"""Activations of the MLP, plain and gated (GLU variants, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.ops.compile import compiled


def activate(x: Tensor, activation: str) -> Tensor:
    """Returns act(x) for "silu", "relu", "gelu" or "gelu_tanh"."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated_activation(gate: Tensor, up: Tensor, activation: str, *, compile: bool = False) -> Tensor:
    """Returns act(gate) * up; with `compile` as one kernel for the forward and one for the
    backward."""
    if compile:
        return _CompiledGate.apply(gate, up, activation)
    if activation == "silu":
        return _GatedSiLU.apply(gate, up)
    return activate(gate, activation) * up


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up; saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(grad)
        dgate = torch.ops.aten.silu_backward(grad * up, gate)
        return dgate, dup


class _CompiledGate(torch.autograd.Function):
    """act(gate) * up; saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return compiled(_gate)(gate.detach(), up.detach(), activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *compiled(_gate_backward)(gate.detach(), up.detach(), grad, ctx.activation), None


def _gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (activate(gate.float(), activation) * up.float()).to(gate.dtype)


def _gate_backward(
    gate: Tensor, up: Tensor, grad: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    wide, wide_grad = gate.float(), grad.float()
    dgate = _activation_backward(wide, wide_grad * up.float(), activation)
    return dgate.to(gate.dtype), (wide_grad * activate(wide, activation)).to(up.dtype)


def _activation_backward(x: Tensor, grad: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if activation == "relu":
        return torch.where(x > 0, grad, 0.0)
    return torch.ops.aten.gelu_backward(
        grad, x, approximate="tanh" if activation == "gelu_tanh" else "none"
    )
