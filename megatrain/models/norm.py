"""Normalisations over the hidden size, over a head's dims, or over all heads, which tensor ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis
from megatrain.models.params import ParamFactory
from megatrain.ops import fused
from megatrain.ops.row_blocks import row_blocks


class _RmsNorm(torch.autograd.Function):
    """RMSNorm (arXiv 1910.07467) in fp32 that keeps its input and one number a token.

    With an axis, x and weight are this rank's share of the normalised dim. Means are then taken over the axis as well: where ranks
    hold copies of some heads, each copy counts alike, and the copies' shares of the gradient add up to the whole.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool, axis: MeshAxis | None
    ) -> Tensor:
        ctx.weight, ctx.plus_one, ctx.axis = weight, plus_one, axis
        rows, factor = x.reshape(-1, x.shape[-1]), _factor(weight, plus_one)
        y, scale = torch.empty_like(rows), rows.new_empty((rows.shape[0], 1), dtype=torch.float32)
        for part, (wide,) in _slabs(rows, axis, rooms=1):
            wide.copy_(rows[part])
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=scale[part])
            _mean_over(scale[part].square_().div_(x.shape[-1]), axis).add_(eps).rsqrt_()
            y[part] = wide.mul_(scale[part]).mul_(factor)
        ctx.save_for_backward(x, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, scale = ctx.saved_tensors
        rows, grads = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, grad))
        factor, dx = _factor(ctx.weight, ctx.plus_one), torch.empty_like(rows)
        dweight = torch.zeros_like(factor) if ctx.needs_input_grad[1] else None
        for part, (normal, wide, product) in _slabs(rows, ctx.axis, rooms=3):
            torch.mul(normal.copy_(rows[part]), scale[part], out=normal)
            torch.mul(wide.copy_(grads[part]), normal, out=product)
            if dweight is not None:
                dweight += product.sum(0)
            inner = _mean_over(torch.mv(product, factor)[:, None].div_(x.shape[-1]), ctx.axis)
            dx[part] = wide.mul_(factor).addcmul_(normal, inner, value=-1).mul_(scale[part])
        return (
            dx.view(x.shape),
            None if dweight is None else dweight.to(ctx.weight.dtype),
            None,
            None,
            None,
        )


def _slabs(
    rows: Tensor, axis: MeshAxis | None, *, rooms: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slabs of rows with fp32 room for as many results of their size, the same for each slab; one slab where each mean is a message."""
    parts = list(row_blocks(rows)) if axis is None or axis.size == 1 else [slice(0, rows.shape[0])]
    room = [
        torch.empty_like(rows[part], dtype=torch.float32)
        for part in parts[:1]
        for _ in range(rooms)
    ]
    for part in parts:
        yield part, [x[: rows[part].shape[0]] for x in room]


def _factor(weight: Tensor, plus_one: bool) -> Tensor:
    return weight.float() + 1.0 if plus_one else weight.float()


def _mean_over(means: Tensor, axis: MeshAxis | None) -> Tensor:
    """Of ranks' means, in place: the same on each."""
    return (
        means
        if axis is None or axis.size == 1
        else collectives.all_reduce(means, axis).div_(axis.size)
    )


class RMSNorm(nn.Module):
    """x [..., n] -> [..., n]; `axis` when ranks share n."""

    def __init__(
        self,
        weight: nn.Parameter,
        eps: float,
        *,
        plus_one: bool = False,
        axis: MeshAxis | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one, self.axis = weight, eps, plus_one, axis
        self.compiled = compiled and (axis is None or axis.size == 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled:
            return fused.rms_norm(x, self.weight, self.eps, plus_one=self.plus_one)
        return _RmsNorm.apply(x, self.weight, self.eps, self.plus_one, self.axis)


class HeadwiseNorm(RMSNorm):
    """One RmsNorm over all heads: x [..., heads, head_dim], this rank's share of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class LayerNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def hidden_norm(parts: ParamFactory, role: str, layer: int | None) -> nn.Module:
    """The norm of a role over the hidden size."""
    a = parts.architecture
    weight = parts.norm(role, layer, a.hidden_size)
    if a.norm == "rms":
        return RMSNorm(weight, a.norm_eps, plus_one=a.norm_plus_one, compiled=parts.compiled)
    return LayerNorm(
        weight, parts.whole(role, layer, "bias", a.hidden_size, kind="norm"), a.norm_eps
    )


def query_key_norms(parts: ParamFactory, layer: int) -> tuple[nn.Module, nn.Module]:
    """Of queries and of keys [S, B, heads, head_dim]; nothing in their place where the model has none."""
    a = parts.architecture
    if a.qk_norm is None:
        return nn.Identity(), nn.Identity()
    if a.qk_norm == "head":
        weights = [
            parts.norm(f"{role}_norm", layer, a.head_dim, partial=True) for role in ("query", "key")
        ]
        query, key = (
            RMSNorm(weight, a.norm_eps, plus_one=a.norm_plus_one, compiled=parts.compiled)
            for weight in weights
        )
        return query, key
    query, key = (
        HeadwiseNorm(
            parts.heads_norm(role, layer),
            a.norm_eps,
            plus_one=a.norm_plus_one,
            axis=parts.mesh.tensor,
            compiled=parts.compiled,
        )
        for role in ("query", "key")
    )
    return query, key
