"""Runs a module whose parameters are elsewhere: each submodule's own are read just before it computes and let go right after.

So a model of any size can be computed in little memory. Dense layers take their rows in blocks and embeddings only the rows that
are looked up, so that not even one matrix need be whole.
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

Read = Callable[[nn.Parameter, slice | None], Tensor]
"""The values of a parameter in fp32, or some of its rows."""

BLOCK_ELEMENTS = 32 << 20
_DENSE = (nn.Linear, ColumnParallelLinear, RowParallelLinear)


@contextmanager
def streamed(module: nn.Module, read: Read) -> Iterator[None]:
    """Within it the module, whose parameters are on the meta device, can be called; they come from `read`. For one rank alone."""
    handles = []
    try:
        for child in module.modules():
            own = dict(child.named_parameters(recurse=False))
            if type(child) in _DENSE:
                child.__dict__["forward"] = _dense(child, read)
            elif isinstance(child, nn.Embedding | VocabParallelEmbedding):
                child.__dict__["forward"] = _looking_up(child, own["weight"], read)
            elif own:
                handles += [
                    child.register_forward_pre_hook(_take(own, read)),
                    child.register_forward_hook(_leave(own)),
                ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for child in module.modules():
            child.__dict__.pop("forward", None)


def rows_of(weight: nn.Parameter) -> Iterator[slice]:
    """Blocks of a matrix's rows, in order."""
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


@contextmanager
def holding(child: nn.Module, name: str, values: Tensor) -> Iterator[None]:
    """Within it the module's parameter has these values."""
    before = child._parameters[name]
    child._parameters[name] = nn.Parameter(values, requires_grad=False)
    try:
        yield
    finally:
        child._parameters[name] = before


def _take(own: dict[str, nn.Parameter], read: Read) -> Callable[..., None]:
    def hook(child: nn.Module, *args: Any) -> None:
        for name, parameter in own.items():
            child._parameters[name] = nn.Parameter(read(parameter, None), requires_grad=False)

    return hook


def _leave(own: dict[str, nn.Parameter]) -> Callable[..., None]:
    def hook(child: nn.Module, *args: Any) -> None:
        child._parameters.update(own)

    return hook


def _dense(child: Any, read: Read) -> Callable[..., Tensor]:
    """x [..., in] times weight [out, in] and bias, a block of rows at a time."""

    def forward(x: Tensor, *more: Any) -> Tensor:
        y = torch.cat(
            [F.linear(x, read(child.weight, rows)) for rows in rows_of(child.weight)], dim=-1
        )
        return y if child.bias is None else y + read(child.bias, None)

    return forward


def _looking_up(child: Any, weight: nn.Parameter, read: Read) -> Callable[..., Tensor]:
    """The module's own forward over a table of the rows that the tokens name, and the tokens numbered by it."""

    def forward(tokens: Tensor, *more: Any) -> Tensor:
        used, numbered = tokens.unique(return_inverse=True)
        table = torch.cat([read(weight, slice(row, row + 1)) for row in used.tolist()])
        padding = {
            name: child.__dict__.pop(name)
            for name in ("padding_idx", "padding_row")
            if name in child.__dict__
        }
        child.__dict__.update(dict.fromkeys(padding))
        try:
            with holding(child, "weight", table):
                return type(child).forward(child, numbered, *more)
        finally:
            child.__dict__.update(padding)

    return forward
