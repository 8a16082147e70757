"""The block's second half, plain or gated (GLU variants, arXiv 2002.05202), its inner features split over tensor ranks.

plain:  down(act(up(x)))              gated:  down(act(gate(x)) * up(x))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.distributed import collectives
from megatrain.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatrain.models.microbatch import Microbatch
from megatrain.models.params import ParamFactory
from megatrain.ops import fused

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


class MLP(nn.Module):
    def __init__(self, parts: ParamFactory, layer: int) -> None:
        super().__init__()
        a = parts.architecture
        self.axis, self.sequence, self.activation = parts.mesh.tensor, parts.sequence, a.activation
        self.compiled = parts.compiled
        self.gate = (
            ColumnParallelLinear(*parts.columns("gate", layer, bias=a.mlp_bias))
            if a.gated
            else None
        )
        self.up = ColumnParallelLinear(*parts.columns("up", layer, bias=a.mlp_bias))
        self.down = RowParallelLinear(
            *parts.rows("down", layer, bias=a.mlp_bias), axis=self.axis, sequence=self.sequence
        )

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        x = collectives.enter_tensor_parallel(x, self.axis, sequence=self.sequence)
        up = self.up(x, microbatch)
        if self.gate is None:
            return self.down(_FORWARD[self.activation](up), microbatch)
        gate = self.gate(x, microbatch)
        if self.compiled:
            return self.down(fused.gated_activation(gate, up, self.activation), microbatch)
        if self.activation == "silu":
            return self.down(_GatedSilu.apply(gate, up), microbatch)
        return self.down(_FORWARD[self.activation](gate) * up, microbatch)
