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


class Frequencies(NamedTuple):
    """Radians a position for each pair [head_dim / 2] in fp32, and the factor on cosines and sines."""

    inv_freq: Tensor
    factor: float


def frequencies(architecture: Architecture, kind: str | None = None) -> Frequencies:
    """Those of the layers of a kind (`Architecture.rope_kinds`)."""
    parameters = architecture.config.rope_parameters
    parameters = parameters if kind is None else parameters[kind]
    if parameters.get("rope_type", "default") == "default":
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float) / architecture.head_dim
        return Frequencies(1.0 / (parameters["rope_theta"] ** exponents), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](architecture.config, torch.device("cpu"), layer_type=kind)
    return Frequencies(inv_freq.float(), float(factor))


def all_frequencies(architecture: Architecture, device: torch.device | str = "cpu") -> dict[str | None, Frequencies]:
    """Of each kind of layer that the model has; empty where positions are learned."""
    kinds = {architecture.rope_kind(layer): None for layer in range(architecture.num_layers)} if architecture.rotary else {}
    found = {kind: frequencies(architecture, kind) for kind in kinds}
    return {kind: Frequencies(inv_freq.to(device), factor) for kind, (inv_freq, factor) in found.items()}


def rotations(positions: Tensor, by_kind: dict[str | None, Frequencies], dtype: torch.dtype) -> dict[str | None, Rotation]:
    """Of positions int64 [B, S], for each kind of layer."""
    return {kind: rotation(positions, *its, dtype) for kind, its in by_kind.items()}


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
