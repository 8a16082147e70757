"""The MLP of a block, plain or gated (GLU variants, arXiv 2002.05202), split over tensor ranks.

plain:  down(act(up(x)))              gated:  down(act(gate(x)) * up(x))
"""

from __future__ import annotations

from torch import Tensor, nn

from megatrain.distributed import collectives
from megatrain.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatrain.models.microbatch import Microbatch
from megatrain.models.params import ParamFactory
from megatrain.ops.activation import activate, gated_activation


class MLP(nn.Module):
    def __init__(self, params: ParamFactory, layer: int) -> None:
        super().__init__()
        a = params.architecture
        self.axis, self.sequence, self.compiled = (
            params.mesh.tensor,
            params.sequence,
            params.compiled,
        )
        self.activation = a.activation
        self.gate: ColumnParallelLinear | None = None
        if a.gated:
            self.gate = ColumnParallelLinear(
                *params.column_parallel("gate", layer, bias=a.mlp_bias)
            )
        self.up = ColumnParallelLinear(*params.column_parallel("up", layer, bias=a.mlp_bias))
        down = params.row_parallel("down", layer, bias=a.mlp_bias)
        self.down = RowParallelLinear(*down, axis=self.axis, sequence=self.sequence)

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """Returns the MLP's output; input and output have the shape of the hidden states."""
        x = collectives.enter_tensor_parallel(x, self.axis, sequence=self.sequence)
        up = self.up(x, microbatch)
        if self.gate is None:
            y = activate(up, self.activation)
        else:
            gate = self.gate(x, microbatch)
            y = gated_activation(gate, up, self.activation, compile=self.compiled)
        return self.down(y, microbatch)
