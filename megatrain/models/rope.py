"""Rotary positions (RoFormer, arXiv 2104.09864) with the scalings that Hugging Face configs name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatrain.ops import fused

if TYPE_CHECKING:
    from megatrain.models.config import TransformerConfig


class Rotation(NamedTuple):
    """Cosines and sines [S, B or 1, 1, dims that turn] of each token's position."""

    cos: Tensor
    sin: Tensor


class Frequencies(NamedTuple):
    """Radians a position for each pair of dims in fp32, and the factor on cosines and sines."""

    inv_freq: Tensor
    factor: float


def frequencies(
    architecture: TransformerConfig, kind: str | None = None, *, length: int
) -> Frequencies:
    """Those of the layers of a kind (`Architecture.rope_kinds`), in sequences of `length` tokens.

    Only longrope asks for the length, and turns otherwise beyond what the model was first made for. It is that of the whole
    sequence, also where positions begin anew within it: so it is the same for all microbatches.
    """
    parameters = architecture.config.rope_parameters
    parameters = parameters if kind is None else parameters[kind]
    if parameters.get("rope_type", "default") == "default":
        dim = architecture.rotary_dim or architecture.head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return Frequencies(1.0 / (parameters["rope_theta"] ** exponents), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        architecture.config, torch.device("cpu"), seq_len=length, layer_type=kind
    )
    return Frequencies(inv_freq.float(), float(factor))


def rotations(
    positions: Tensor, architecture: TransformerConfig, dtype: torch.dtype
) -> dict[str | None, Rotation]:
    """Of positions int64 [B, S], for each kind of layer that the model has; empty where positions are learned."""
    if not architecture.rotary:
        return {}
    kinds = dict.fromkeys(architecture.rope_kind(layer) for layer in range(architecture.num_layers))
    found = {kind: frequencies(architecture, kind, length=positions.shape[1]) for kind in kinds}
    return {
        kind: rotation(positions, inv_freq.to(positions.device), factor, dtype)
        for kind, (inv_freq, factor) in found.items()
    }


def rotation(positions: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> Rotation:
    """Of positions int64 [B, S]; angles are taken in fp32 whatever the model's dtype."""
    angles = positions.t().float()[:, :, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)[:, :, None, :]
    return Rotation((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))


class _Rotate(torch.autograd.Function):
    """x [S, B, heads, head_dim] turned by each position's angle; the backward turns back and keeps nothing of x."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        half = grad.shape[-1] // 2
        dx = grad * cos
        dx[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return dx, None, None


def rotate(x: Tensor, turn: Rotation, *, compiled: bool = False) -> Tensor:
    """x [S, B, heads, head_dim] turned, or its first dims where there are fewer cosines than dims."""
    dim = turn.cos.shape[-1]
    whole = fused.rotate_whole if compiled else _Rotate.apply
    if dim == x.shape[-1]:
        return whole(x, turn.cos, turn.sin)
    return torch.cat((whole(x[..., :dim], turn.cos, turn.sin), x[..., dim:]), dim=-1)
