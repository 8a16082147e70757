"""Names of the training dtypes, and the dtype in which a device multiplies matrices fast."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Torch's dtype for each value of `train.dtype`."""


@functools.cache
def lacks_native_bf16(device_type: str) -> bool:
    """Returns True if bf16 products are faster through fp32.

    On CPUs without bf16 units, bf16 products take 5 to 100 times longer than fp32 products.
    """
    if device_type != "cpu":
        return False
    return not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def to_matmul_dtype(x: Tensor) -> Tensor:
    """Returns x in the dtype that its device multiplies fast; callers round results to x's
    dtype."""
    return x.float() if x.dtype != torch.float32 and lacks_native_bf16(x.device.type) else x
