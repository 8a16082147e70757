"""What a conversion reads: a model's tensors by their Hugging Face names, whatever folder they lie in.

Each kind of folder has one class with the methods of `Source`. A tensor comes whole or by rows, so that none of them ever has
to be in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatrain.checkpoint.tensor_io import ByteSpan, Index
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig

BLOCK_BYTES = 16 << 20


class Source(Protocol):
    """A model to convert.

    Attributes:
        kind: what the folder is, in words.
        folder: where it is.
        config: the transformers config of the model.
        extras: the folder whose tokenizer and other small files belong to the model; None when there is none.
        note: a sentence that the user should read; empty when there is none.
    """

    kind: str
    folder: Path
    config: Any
    extras: Path | None
    note: str

    def adopt(self, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]) -> None:
        """Find the tensors of a model that holds the expected ones; refuses a folder with others that cannot be left out."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, index: Index | None = None) -> Tensor: ...


class Readable(Protocol):
    """Tensors by name, as far as writing, hashing and computing with them go."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, index: Index | None = None) -> Tensor: ...


@runtime_checkable
class HasSpans(Protocol):
    """Tensors of which some lie in files as they are to be written."""

    def span(self, name: str) -> ByteSpan | None: ...


class CastTensors:
    """The tensors of another in one dtype where they are of floating point; None leaves each as it is."""

    def __init__(self, tensors: Readable, dtype: torch.dtype | None) -> None:
        self._tensors, self._dtype = tensors, dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._tensors.dtype(name)
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def span(self, name: str) -> ByteSpan | None:
        """Where the bytes are, of a tensor that keeps its dtype."""
        if not isinstance(self._tensors, HasSpans) or self.dtype(name) != self._tensors.dtype(name):
            return None
        return self._tensors.span(name)

    def read(self, name: str, index: Index | None = None) -> Tensor:
        exact = self._tensors.read(name, index)
        rounded = exact.to(self.dtype(name))
        if rounded.dtype == torch.float16 != exact.dtype and not torch.equal(
            rounded.isfinite(), exact.isfinite()
        ):
            raise CheckpointError(
                f"{name} holds {float(exact.abs().max()):.4g}, which is beyond what fp16 can hold; use bf16 or fp32"
            )
        return rounded


def nbytes(tensors: Readable, name: str) -> int:
    return math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize


def row_blocks_of(tensors: Readable, name: str) -> Iterator[Tensor]:
    """The tensor's rows in order, about BLOCK_BYTES at a time."""
    shape = tensors.shape(name)
    if not shape or not math.prod(shape):
        yield tensors.read(name)
        return
    row = max(1, nbytes(tensors, name) // shape[0])
    step = max(1, BLOCK_BYTES // row)
    for start in range(0, shape[0], step):
        yield tensors.read(name, (slice(start, min(start + step, shape[0])),))
