"""Frozen weights held in 4 bits: NF4 of QLoRA (arXiv 2305.14314, section 3), with bitsandbytes'
kernels.

    W [out, in], a row:  | 64 values | 64 values | ...     block: 64 codes of 4 bits, fp32 absmax

A code names one of 16 values in [-1, 1], the quantiles of a normal distribution. The code's value
times the block's absmax is the weight, at 4.5 bits a weight. Blocks never cross rows, and a rank's
share of a row consists of complete blocks (`models/quantize.py` checks this). So a weight gets the
same value on every layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Consecutive values of a row that share a scale."""


class NF4Weight:
    """A frozen weight [out, in] in NF4, in place of a parameter.

    It is no `nn.Parameter`, so nothing casts, reduces or updates it.

    Attributes:
        sharding: the shard spec of the parameter that it replaces.
        dtype: the dtype that it was quantized from, in which adapters are created.
    """

    def __init__(self, weight: Tensor, sharding: Any) -> None:
        from bitsandbytes import functional

        assert weight.shape[1] % BLOCK == 0, "checked before ranks start"
        codes, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, quant_type="nf4"
        )
        self._codes, self._scales, self._values = codes, state.absmax, state.code
        self._describe(weight, sharding)

    @classmethod
    def on_meta(cls, weight: Tensor, sharding: Any) -> NF4Weight:
        """Returns an NF4 weight without memory that replaces a weight on the meta device."""
        result = cls.__new__(cls)
        result._codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device="meta")
        result._scales = torch.empty(weight.numel() // BLOCK, dtype=torch.float32, device="meta")
        result._describe(weight, sharding)
        return result

    def _describe(self, weight: Tensor, sharding: Any) -> None:
        self.sharding, self.shape = sharding, weight.shape
        self.dtype, self.device = weight.dtype, weight.device

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight as a matrix [out, in]."""
        if self._codes.is_meta:
            return torch.empty(self.shape, dtype=dtype, device="meta")
        from bitsandbytes import functional

        state = functional.QuantState(
            self._scales,
            shape=self.shape,
            code=self._values,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        return functional.dequantize_4bit(self._codes, state)


def dequantize(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """Returns a quantized weight as a matrix in `dtype`, and any other weight as it is."""
    return weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight
