"""What stands between matrix products and messages as one kernel each, made by torch.compile: for `train.compile`.

Norms, gated activations and rotations read and write a layer's whole activations; written out, each of their steps does, and
compiled they do once. Only these are compiled, forward and backward by themselves, and what stands between the products of
causal.py and the two ends of the cross-entropy: products, messages, gradients that are added up or left for later and
recomputation stay as they are, on every layout. All layers share a kernel.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.ops.compile import compiled

if TYPE_CHECKING:
    from megatrain.models.config import TransformerConfig


def check_compile(a: TransformerConfig, *, tensor: int, on_gpu: bool) -> None:
    """Refuse to compile for a model that has nothing to be compiled, or on a machine that cannot."""
    if tensor > 1 and a.norm != "rms" and not a.gated and not a.rotary:
        raise ConfigError(
            "train.compile",
            True,
            f"has nothing to compile in a {a.model_type} model on tensor ranks: neither RMSNorm nor gates nor "
            "rotations, and its cross-entropy waits for messages",
            "leave it out, or set parallel.tensor=1",
            fix={"train.compile": False},
        )
    if on_gpu:
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "train.compile",
                True,
                "needs triton for GPUs",
                "pip install triton, or leave it out",
                fix={"train.compile": False},
            )
        return
    compiler, header = (
        os.environ.get("CXX", "g++"),
        Path(sysconfig.get_path("include")) / "Python.h",
    )
    if shutil.which(compiler) is None:
        raise ConfigError(
            "train.compile",
            True,
            f"needs a C++ compiler on CPUs, and there is no {compiler}",
            "install one, name yours in the environment variable CXX, or leave the setting out",
            fix={"train.compile": False},
        )
    if not header.is_file():
        raise ConfigError(
            "train.compile",
            True,
            f"needs Python's headers on CPUs, and there is no {header}",
            "install them (python3-dev), or leave the setting out",
            fix={"train.compile": False},
        )


class _RmsNorm(torch.autograd.Function):
    """See `norms.py`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        y, scale = compiled(_normalise)(x.detach(), weight.detach(), eps, plus_one)
        ctx.save_for_backward(x, scale)
        ctx.weight, ctx.plus_one = weight, plus_one
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, scale = ctx.saved_tensors
        dx, dweight = compiled(_normalise_back)(
            x.detach(), scale, grad, ctx.weight.detach(), ctx.plus_one
        )
        return dx, dweight if ctx.needs_input_grad[1] else None, None, None


def _normalise(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + float(plus_one))).to(x.dtype), scale


def _normalise_back(
    x: Tensor, scale: Tensor, grad: Tensor, weight: Tensor, plus_one: bool
) -> tuple[Tensor, Tensor]:
    normal, wide, factor = x.float() * scale, grad.float(), weight.float() + float(plus_one)
    product = wide * normal
    inner = (product * factor).mean(-1, keepdim=True)
    dx = (wide * factor - normal * inner) * scale
    return dx.to(x.dtype), product.flatten(0, -2).sum(0).to(weight.dtype)


class _Gated(torch.autograd.Function):
    """act(gate) * up, keeping the two inputs and nothing between."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return compiled(_gate)(gate.detach(), up.detach(), activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *compiled(_gate_back)(gate.detach(), up.detach(), grad, ctx.activation), None


def _act(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _act_back(x: Tensor, grad: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if activation == "relu":
        return torch.where(x > 0, grad, 0.0)
    return torch.ops.aten.gelu_backward(
        grad, x, approximate="tanh" if activation == "gelu_tanh" else "none"
    )


def _gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (_act(gate.float(), activation) * up.float()).to(gate.dtype)


def _gate_back(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide, wide_grad = gate.float(), grad.float()
    dgate = _act_back(wide, wide_grad * up.float(), activation)
    return dgate.to(gate.dtype), (wide_grad * _act(wide, activation)).to(up.dtype)


class _Rotate(torch.autograd.Function):
    """See `rotary.py`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return compiled(_turn)(x.detach(), cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return compiled(_turn_back)(grad, *ctx.saved_tensors), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide, cos, sin = _halves(x), _halves(cos), _halves(sin)
    return (wide * cos + wide.flip(-2) * _signs(x) * sin).flatten(-2).to(x.dtype)


def _turn_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide, cos, sin = _halves(grad), _halves(cos), _halves(sin)
    return (wide * cos - (wide * sin).flip(-2) * _signs(grad)).flatten(-2).to(grad.dtype)


def _halves(x: Tensor) -> Tensor:
    """x [..., d] in fp32 as [..., 2, d/2]: flipped, and not cut and put together, so that both halves are one vectorised loop."""
    return x.float().unflatten(-1, (2, -1))


def _signs(x: Tensor) -> Tensor:
    return torch.arange(-1.0, 2.0, 2.0, device=x.device)[:, None]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """x [..., n] normalised over n."""
    return _RmsNorm.apply(x, weight, eps, plus_one)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    return _Gated.apply(gate, up, activation)


def rotate_whole(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [S, B, heads, d] turned, with d cosines and sines."""
    return _Rotate.apply(x, cos, sin)
