"""Initial weights as a function of (seed, name, global index), part by part."""

from __future__ import annotations

import torch
from torch import nn

from megatrain.models.random import normal_slice, uniform_slice
from megatrain.parallel.sharding import parameters


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill every parameter; a rank makes the part it holds and no more."""
    for declaration, parameter in parameters(module):
        parameter.zero_()
        part = declaration.part_of(parameter)
        if declaration.init.bound is not None:
            part.copy_(uniform_slice(seed, declaration.name, declaration.shape, declaration.whole_slice(), bound=declaration.init.bound))
        elif declaration.init.std is None:
            part.fill_(declaration.init.value)
        elif part.numel():
            values = normal_slice(seed, declaration.name, declaration.shape, declaration.whole_slice(), std=declaration.init.std)
            part.copy_(values)
            row = declaration.init.zero_row
            if row is not None and declaration.start <= row < declaration.start + part.shape[0]:
                part[row - declaration.start] = 0.0
