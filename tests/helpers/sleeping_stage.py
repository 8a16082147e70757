"""Blocks that sleep: the time of a rank is known, and two cores are enough."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from megatrain.models.microbatch import Microbatch
from megatrain.models.transformer import Block


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None


@contextmanager
def sleeping(seconds: float, slow: dict[int, float]) -> Iterator[None]:
    """Makes blocks sleep in forward and backward, those in `slow` for the seconds given there."""
    make, compute = Block.__init__, Block._compute

    def numbered(block, parts, layer, **arguments):
        make(block, parts, layer, **arguments)
        block.seconds = slow.get(layer, seconds)

    def slowly(block, x: Tensor, microbatch: Microbatch) -> Tensor:
        return _Sleep.apply(compute(block, x, microbatch), block.seconds)

    with patch.object(Block, "__init__", numbered), patch.object(Block, "_compute", slowly):
        yield
