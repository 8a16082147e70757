"""Forward passes of modules on the meta device, whose parameters are read when they are needed.

Each submodule reads its own parameters just before it computes and drops them right after: a model
of any size runs in little memory. Linear layers read blocks of rows and embeddings only the
rows that are looked up: not even one matrix has to fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.distributed.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

ParameterReader = Callable[[nn.Parameter, slice | None], Tensor]
"""Returns the values of a parameter in fp32, or those of some rows."""

BLOCK_ELEMENTS = 32 << 20
_LINEAR = (nn.Linear, ColumnParallelLinear, RowParallelLinear)


@contextmanager
def streamed(module: nn.Module, read: ParameterReader) -> Iterator[None]:
    """Makes a module callable whose parameters are on the meta device; for one rank alone."""
    handles = []
    try:
        for child in module.modules():
            own = dict(child.named_parameters(recurse=False))
            if type(child) in _LINEAR:
                child.__dict__["forward"] = _linear_forward(child, read)
            elif isinstance(child, nn.Embedding | VocabParallelEmbedding):
                child.__dict__["forward"] = _embedding_forward(child, own["weight"], read)
            elif own:
                handles += [
                    child.register_forward_pre_hook(_load_hook(own, read)),
                    child.register_forward_hook(_unload_hook(own)),
                ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for child in module.modules():
            child.__dict__.pop("forward", None)


def row_blocks(weight: nn.Parameter) -> Iterator[slice]:
    """Yields consecutive blocks of a matrix's rows."""
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


@contextmanager
def with_values(module: nn.Module, name: str, values: Tensor) -> Iterator[None]:
    """Gives a parameter other values, of any shape, inside the block."""
    original = module._parameters[name]
    module._parameters[name] = nn.Parameter(values, requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = original


def _load_hook(own: dict[str, nn.Parameter], read: ParameterReader) -> Callable[..., None]:
    def hook(module: nn.Module, *args: Any) -> None:
        for name, parameter in own.items():
            module._parameters[name] = nn.Parameter(read(parameter, None), requires_grad=False)

    return hook


def _unload_hook(own: dict[str, nn.Parameter]) -> Callable[..., None]:
    def hook(module: nn.Module, *args: Any) -> None:
        module._parameters.update(own)

    return hook


def _linear_forward(module: Any, read: ParameterReader) -> Callable[..., Tensor]:
    """Returns a forward of x [..., in] with weight [out, in] and bias, by blocks of output rows."""

    def forward(x: Tensor, *args: Any) -> Tensor:
        blocks = [F.linear(x, read(module.weight, rows)) for rows in row_blocks(module.weight)]
        y = torch.cat(blocks, dim=-1)
        return y if module.bias is None else y + read(module.bias, None)

    return forward


def _embedding_forward(
    module: Any, weight: nn.Parameter, read: ParameterReader
) -> Callable[..., Tensor]:
    """Returns the module's forward on a table of only the rows that the tokens use."""

    def forward(tokens: Tensor, *args: Any) -> Tensor:
        used, row_of_token = tokens.unique(return_inverse=True)
        table = torch.cat([read(weight, slice(row, row + 1)) for row in used.tolist()])
        # Row numbers of the padding do not apply to the small table.
        padding = {
            name: module.__dict__.pop(name)
            for name in ("padding_idx", "padding_row")
            if name in module.__dict__
        }
        module.__dict__.update(dict.fromkeys(padding))
        try:
            with with_values(module, "weight", table):
                return type(module).forward(module, row_of_token, *args)
        finally:
            module.__dict__.update(padding)

    return forward
