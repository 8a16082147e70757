"""Initial weights as a function of (seed, tensor name, global index): the same on every layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatrain.distributed.sharding import ShardSpec, parameters
from megatrain.ops.random import normal_slice, uniform_slice


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Initializes every parameter; a rank generates only its shards."""
    for spec, parameter in parameters(module):
        initialize_parameter(spec, parameter, seed)


def initialize_parameter(spec: ShardSpec, parameter: nn.Parameter, seed: int) -> None:
    """Initializes one parameter; its padding becomes zero."""
    parameter.zero_()
    shard = spec.local_view(parameter)
    for part in spec.slices():
        shard[part.shard] = _values(seed, spec, part.full)
    row = spec.init.zero_row
    if row is not None and spec.start <= row < spec.start + shard.shape[0]:
        shard[row - spec.start] = 0.0


def _values(seed: int, spec: ShardSpec, part: tuple[slice, ...]) -> Tensor | float:
    init = spec.init
    if init.bound is not None:
        return uniform_slice(seed, spec.name, spec.shape, part, bound=init.bound)
    if init.std is not None:
        return normal_slice(seed, spec.name, spec.shape, part, std=init.std)
    return init.value
