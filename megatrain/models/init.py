"""Initial weights as a function of (seed, name, global index), part by part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatrain.distributed.sharding import ShardSpec, parameters
from megatrain.ops.random import normal_slice, uniform_slice


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill every parameter; a rank makes the part it holds and no more."""
    for declaration, parameter in parameters(module):
        initialize_parameter(declaration, parameter, seed)


def initialize_parameter(declaration: ShardSpec, parameter: nn.Parameter, seed: int) -> None:
    parameter.zero_()
    part = declaration.part_of(parameter)
    for region in declaration.regions():
        part[region.part] = _values(seed, declaration, region.whole)
    row = declaration.init.zero_row
    if row is not None and declaration.start <= row < declaration.start + part.shape[0]:
        part[row - declaration.start] = 0.0


def _values(seed: int, declaration: ShardSpec, region: tuple[slice, ...]) -> Tensor | float:
    init = declaration.init
    if init.bound is not None:
        return uniform_slice(seed, declaration.name, declaration.shape, region, bound=init.bound)
    if init.std is not None:
        return normal_slice(seed, declaration.name, declaration.shape, region, std=init.std)
    return init.value
