"""Rows of a tensor by as many as a CPU's cache takes, for work that goes over them several times.

Element-wise work on whole activations writes each intermediate result to memory and reads it back. On a GPU, where a kernel's start
costs more than that, all rows are one slab.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 1 << 16
"""For each thread: with two fp32 intermediates half of a 2 MiB cache, with none to spare for a smaller one."""


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Ranges of the rows of x [n, ...], one after the other."""
    count = x.shape[0]
    step = count
    if x.device.type == "cpu":
        step = max(1, ELEMENTS * torch.get_num_threads() * count // max(1, x.numel()))
    for start in range(0, count, max(1, step)):
        yield slice(start, start + step)
