"""What a classifier is to say, as one number a labelled token, so that it travels where a next token does.

| problem       | what is right            | its number                        |
|---------------|--------------------------|-----------------------------------|
| single-label  | class 2                  | 2                                 |
| multi-label   | classes 0 and 2 of 4     | 0b0101 = 5                        |
| regression    | -1.5                     | the 32 bits of the float, unsigned |

All are 0 or more, as labels with a loss are; tokens without one have -100.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatrain.config.schema import Problem

if TYPE_CHECKING:
    from torch import Tensor

MOST_CLASSES = 62
"""Of a multi-label problem: bits of a number that stays positive."""


def encode_classes(classes: Iterable[int]) -> int:
    """The number of a multi-label target."""
    return sum(1 << number for number in set(classes))


def encode_value(value: float) -> int:
    """The number of a regression's target."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def decode(numbers: Tensor, *, problem: Problem, num_labels: int) -> Tensor:
    """Targets of numbers int64 [n]: classes int64 [n], or fp32 [n, labels] of 0 and 1, or fp32 [n, 1]."""
    if problem == "single-label":
        return numbers
    import torch

    if problem == "multi-label":
        return (numbers[:, None] >> torch.arange(num_labels, device=numbers.device) & 1).float()
    # From the upper half of unsigned numbers to negative ones, whose bits are the same.
    signed = torch.where(numbers >= 1 << 31, numbers - (1 << 32), numbers).to(torch.int32)
    return signed.view(torch.float32)[:, None]
