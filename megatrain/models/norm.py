"""Norms over the hidden size, over each head, or over all heads, which tensor ranks share."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis
from megatrain.models.params import ParamFactory
from megatrain.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """x [..., n] -> [..., n]; `axis` is given if its ranks hold shares of n."""

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
        self.weight, self.eps, self.plus_one, self.compiled = weight, eps, plus_one, compiled
        self.reduce_mean = None
        if axis is not None and axis.size > 1:
            self.reduce_mean = partial(collectives.mean_over, axis=axis)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(
            x,
            self.weight,
            self.eps,
            plus_one=self.plus_one,
            reduce_mean=self.reduce_mean,
            compile=self.compiled,
        )


class AllHeadsNorm(RMSNorm):
    """One RMSNorm over all heads: x [..., heads, head_dim], this rank's share of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class LayerNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def hidden_norm(params: ParamFactory, role: str, layer: int | None) -> nn.Module:
    """Creates the norm of a role over the hidden size."""
    a = params.architecture
    weight = params.norm(role, layer, a.hidden_size)
    if a.norm == "rms":
        return RMSNorm(weight, a.norm_eps, plus_one=a.norm_plus_one, compiled=params.compiled)
    bias = params.replicated(role, layer, "bias", a.hidden_size, kind="norm")
    return LayerNorm(weight, bias, a.norm_eps)


def optional_norm(params: ParamFactory, role: str, layer: int, *, present: bool) -> nn.Module:
    """Creates the norm of a role over the hidden size, or the identity."""
    return hidden_norm(params, role, layer) if present else nn.Identity()


def query_key_norm(params: ParamFactory, role: str, layer: int) -> nn.Module:
    """Creates the norm of a layer's queries or keys [S, B, heads, head_dim], or the identity."""
    a = params.architecture
    if a.qk_norm is None:
        return nn.Identity()
    if a.qk_norm == "head":
        weight = params.norm(f"{role}_norm", layer, a.head_dim, partial=True)
        return RMSNorm(weight, a.norm_eps, plus_one=a.norm_plus_one, compiled=params.compiled)
    return AllHeadsNorm(
        params.sharded_norm(role, layer),
        a.norm_eps,
        plus_one=a.norm_plus_one,
        axis=params.mesh.tensor,
        compiled=params.compiled,
    )
