"""Rotary positions (RoFormer, arXiv 2104.09864) with the scalings that Hugging Face configs name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatrain.models.architecture import Architecture


class Rotation(NamedTuple):
    """Cosines and sines [S, B or 1, 1, head_dim] of each token's position."""

    cos: Tensor
    sin: Tensor


def frequencies(architecture: Architecture) -> tuple[Tensor, float]:
    """Radians a position for each pair [head_dim / 2] in fp32, and the factor on cosines and sines."""
    parameters = architecture.config.rope_parameters
    if parameters.get("rope_type", "default") == "default":
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float) / architecture.head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](architecture.config, torch.device("cpu"))
    return inv_freq.float(), float(factor)


def rotation(positions: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> Rotation:
    """Of positions int64 [B, S]; angles are taken in fp32 whatever the model's dtype."""
    angles = positions.t().float()[:, :, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)[:, :, None, :]
    return Rotation((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))


class _Rotate(torch.autograd.Function):
    """x [S, B, heads, head_dim] turned by each position's angle; the backward turns back and keeps nothing of x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        half = grad.shape[-1] // 2
        dx = grad * cos
        dx[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return dx, None, None


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    return _Rotate.apply(x, turn.cos, turn.sin)
