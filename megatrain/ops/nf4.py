"""Frozen weights held in 4 bits: NF4 of QLoRA (arXiv 2305.14314, section 3), with bitsandbytes' kernels.

    W [out, in], a row:  | 64 values | 64 values | ...     each block: 64 codes of 4 bits, and its largest magnitude in fp32

A code names one of 16 values in [-1, 1], the quantiles of a normal distribution; times the block's largest magnitude it is the
weight. That is 4.5 bits a weight. Blocks never cross rows and a rank's part of a row is whole blocks (`models/quantize.py` refuses
others), so a weight becomes the same value whatever ranks split the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatrain.distributed.sharding import ShardSpec, shard_spec

BLOCK = 64
"""Neighbours in a row that share a scale."""

BYTES_PER_WEIGHT = 0.5 + 4 / BLOCK


class NF4Weight:
    """A frozen weight [out, in] in NF4, in a parameter's place. No parameter: nothing casts, reduces or updates it.

    Attributes:
        sharding: what it is a part of, as a parameter's.
        dtype: what it was quantized from, and what parameters beside it are made in.
    """

    def __init__(self, weight: Tensor, declaration: ShardSpec) -> None:
        from bitsandbytes import functional

        assert weight.shape[1] % BLOCK == 0, "checked before ranks start"
        codes, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, quant_type="nf4"
        )
        self._codes, self._scales, self._values = codes, state.absmax, state.code
        self.sharding, self.shape, self.dtype, self.device = (
            declaration,
            weight.shape,
            weight.dtype,
            weight.device,
        )

    @classmethod
    def without_memory(cls, weight: Tensor) -> NF4Weight:
        """Of a weight on the meta device: the same sizes, on it too."""
        made = cls.__new__(cls)
        made._codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device="meta")
        made._scales = torch.empty(weight.numel() // BLOCK, dtype=torch.float32, device="meta")
        made.sharding, made.shape, made.dtype, made.device = (
            shard_spec(weight),
            weight.shape,
            weight.dtype,
            weight.device,
        )
        return made

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, [out, in]."""
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
    """The weight as a matrix: itself, or of a quantized one what its codes stand for, in this dtype."""
    return weight.dense(dtype) if isinstance(weight, NF4Weight) else weight
