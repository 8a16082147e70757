"""The block's second half, plain or gated (GLU variants, arXiv 2002.05202), its inner features split over tensor ranks.

plain:  down(act(up(x)))              gated:  down(act(gate(x)) * up(x))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.models import fused
from megatrain.models.context import Context
from megatrain.models.parts import Parts
from megatrain.parallel import collectives
from megatrain.parallel.layers import Linear, RowLinear

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up, keeping the two inputs and nothing between."""

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


class FeedForward(nn.Module):
    def __init__(self, parts: Parts, layer: int) -> None:
        super().__init__()
        a = parts.architecture
        self.axis, self.sequence, self.activation = parts.grid.tensor, parts.sequence, a.activation
        self.compiled = parts.compiled
        self.gate = Linear(*parts.columns("gate", layer, bias=a.mlp_bias)) if a.gated else None
        self.up = Linear(*parts.columns("up", layer, bias=a.mlp_bias))
        self.down = RowLinear(
            *parts.rows("down", layer, bias=a.mlp_bias), axis=self.axis, sequence=self.sequence
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = collectives.enter(x, self.axis, sequence=self.sequence)
        up = self.up(x, context)
        if self.gate is None:
            return self.down(_FORWARD[self.activation](up), context)
        gate = self.gate(x, context)
        if self.compiled:
            return self.down(fused.gated(gate, up, self.activation), context)
        if self.activation == "silu":
            return self.down(_GatedSilu.apply(gate, up), context)
        return self.down(_FORWARD[self.activation](gate) * up, context)
