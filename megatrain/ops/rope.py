"""Rotations of queries and keys by their positions (RoFormer, arXiv 2104.09864).

Shapes: x [S, B, heads, d]; cosines and sines [S, B or 1, 1, r], where the first r <= d dims rotate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatrain.ops.compile import compiled


class Rotation(NamedTuple):
    """Cosines and sines [S, B or 1, 1, r] of the angles of each token's position."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rotation: Rotation, *, compile: bool = False) -> Tensor:
    """Returns x [S, B, heads, d] with its first r dims rotated."""
    apply = _CompiledRotate.apply if compile else _Rotate.apply
    dim = rotation.cos.shape[-1]
    if dim == x.shape[-1]:
        return apply(x, *rotation)
    return torch.cat((apply(x[..., :dim], *rotation), x[..., dim:]), dim=-1)


class _Rotate(torch.autograd.Function):
    """Rotates in the backward by the opposite angle, and saves nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        dx = grad * cos
        dx[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return dx, None, None


class _CompiledRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return compiled(_rotate)(x.detach(), cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return compiled(_rotate_backward)(grad, *ctx.saved_tensors), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide, cos, sin = _halves(x), _halves(cos), _halves(sin)
    return (wide * cos + wide.flip(-2) * _signs(x) * sin).flatten(-2).to(x.dtype)


def _rotate_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide, cos, sin = _halves(grad), _halves(cos), _halves(sin)
    return (wide * cos - (wide * sin).flip(-2) * _signs(grad)).flatten(-2).to(grad.dtype)


def _halves(x: Tensor) -> Tensor:
    """Returns x [..., r] in fp32 as [..., 2, r / 2].

    Flipping the halves compiles to one vectorised loop; slicing and concatenating them does not.
    """
    return x.float().unflatten(-1, (2, -1))


def _signs(x: Tensor) -> Tensor:
    return torch.arange(-1.0, 2.0, 2.0, device=x.device)[:, None]
