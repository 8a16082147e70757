"""Normalisations over the hidden size, over a head's dims, or over all heads, which tensor ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.models.parts import Parts
from megatrain.parallel import collectives
from megatrain.parallel.grid import Axis


class _RmsNorm(torch.autograd.Function):
    """RMSNorm (arXiv 1910.07467) in fp32 that keeps its input and one number a token.

    With an axis, x and weight are this rank's share of the normalised dim. Means are then taken over the axis as well: where ranks
    hold copies of some heads, each copy counts alike, and the copies' shares of the gradient add up to the whole.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool, axis: Axis | None) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(_mean(wide.square(), axis) + eps)
        ctx.save_for_backward(x, scale)
        ctx.weight, ctx.plus_one, ctx.axis = weight, plus_one, axis
        return (wide * scale).mul_(_factor(weight, plus_one)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, scale = ctx.saved_tensors
        weight = ctx.weight
        normal = x.float() * scale
        grad = grad.float()
        dweight = torch.mul(grad, normal).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dnormal = grad * _factor(weight, ctx.plus_one)
        inner = _mean(torch.mul(dnormal, normal), ctx.axis)
        dx = dnormal.sub_(normal.mul_(inner)).mul_(scale)
        return dx.to(x.dtype), dweight, None, None, None


def _factor(weight: Tensor, plus_one: bool) -> Tensor:
    return weight.float() + 1.0 if plus_one else weight


def _mean(x: Tensor, axis: Axis | None) -> Tensor:
    """Of the last dim, over all ranks of the axis: the same on each."""
    mean = x.mean(-1, keepdim=True)
    return mean if axis is None or axis.size == 1 else collectives.all_reduce(mean, axis).div_(axis.size)


class RmsNorm(nn.Module):
    """x [..., n] -> [..., n]; `axis` when ranks share n."""

    def __init__(self, weight: nn.Parameter, eps: float, *, plus_one: bool = False, axis: Axis | None = None) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one, self.axis = weight, eps, plus_one, axis

    def forward(self, x: Tensor) -> Tensor:
        return _RmsNorm.apply(x, self.weight, self.eps, self.plus_one, self.axis)


class HeadsNorm(RmsNorm):
    """One RmsNorm over all heads: x [..., heads, head_dim], this rank's share of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class LayerNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def hidden_norm(parts: Parts, role: str, layer: int | None) -> nn.Module:
    """The norm of a role over the hidden size."""
    a = parts.architecture
    weight = parts.norm(role, layer, a.hidden_size)
    if a.norm == "rms":
        return RmsNorm(weight, a.norm_eps, plus_one=a.norm_plus_one)
    return LayerNorm(weight, parts.whole(role, layer, "bias", a.hidden_size, kind="norm"), a.norm_eps)


def query_key_norms(parts: Parts, layer: int) -> tuple[nn.Module, nn.Module]:
    """Of queries and of keys [S, B, heads, head_dim]; nothing in their place where the model has none."""
    a = parts.architecture
    if a.qk_norm is None:
        return nn.Identity(), nn.Identity()
    if a.qk_norm == "head":
        weights = [parts.norm(f"{role}_norm", layer, a.head_dim, partial=True) for role in ("query", "key")]
        query, key = (RmsNorm(weight, a.norm_eps, plus_one=a.norm_plus_one) for weight in weights)
        return query, key
    query, key = (HeadsNorm(parts.heads_norm(role, layer), a.norm_eps, plus_one=a.norm_plus_one, axis=parts.grid.tensor)
                  for role in ("query", "key"))  # fmt: skip
    return query, key
