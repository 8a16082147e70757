"""Targets of a classifier, one integer per labelled token, like the labels of a language model.

| problem       | target                   | its integer                       |
|---------------|--------------------------|-----------------------------------|
| single-label  | class 2                  | 2                                 |
| multi-label   | classes 0 and 2 of 4     | 0b0101 = 5                        |
| regression    | -1.5                     | the 32 bits of the float, unsigned |

All integers are at least 0. Tokens without a target have IGNORE_INDEX.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatrain.config.schema import Problem

if TYPE_CHECKING:
    from torch import Tensor

MAX_CLASSES = 62
"""Most classes of a multi-label problem: one bit each in an integer that stays positive."""


def encode_classes(classes: Iterable[int]) -> int:
    """Returns the integer of a multi-label target."""
    return sum(1 << number for number in set(classes))


def encode_value(value: float) -> int:
    """Returns the integer of a regression target."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def decode_targets(numbers: Tensor, *, problem: Problem, num_labels: int) -> Tensor:
    """Returns the targets that int64 [n] encode.

    Classes int64 [n] if single-label, fp32 [n, labels] of 0 and 1 if multi-label, else fp32 [n, 1].
    """
    if problem == "single-label":
        return numbers
    import torch

    if problem == "multi-label":
        return (numbers[:, None] >> torch.arange(num_labels, device=numbers.device) & 1).float()
    # Numbers in the upper half become negative; their 32 bits stay the same.
    signed = torch.where(numbers >= 1 << 31, numbers - (1 << 32), numbers).to(torch.int32)
    return signed.view(torch.float32)[:, None]
