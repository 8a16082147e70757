"""Blocks of rows that fit a CPU's cache, for work that passes over them several times.

Elementwise work on whole activations writes each intermediate result to memory and reads it back.
On a GPU the start of a kernel costs more than that, so all rows form one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 1 << 16
"""Elements of a block for each thread: two fp32 intermediates then fill half of a 2 MiB cache."""


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Yields consecutive ranges of the rows of x [n, ...]."""
    count = x.shape[0]
    step = count
    if x.device.type == "cpu":
        step = max(1, ELEMENTS * torch.get_num_threads() * count // max(1, x.numel()))
    for start in range(0, count, max(1, step)):
        yield slice(start, start + step)
