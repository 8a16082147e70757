"""Sources of a conversion: tensors by Hugging Face names, whatever the format of the folder.

Each format has one class with the methods of `Source`. A tensor is read whole or by rows, so that
no tensor has to fit into memory. Folders of transformers and checkpoints of megatrain, which have
the same files, are in this file; those of other trainers have files of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatrain.checkpoint import manifest
from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.init_from_hf import BUFFERS, stored_names
from megatrain.checkpoint.tensor_io import ByteSpan, Index
from megatrain.checkpoint.train_state import train_state_path
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig, load_hf_config
from megatrain.text import join_names

BLOCK_BYTES = 16 << 20
"""Bytes of the rows that are read at once."""


class TensorReader(Protocol):
    """Tensors by name, as writing, hashing and computing need them."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, index: Index | None = None) -> Tensor: ...


class Source(TensorReader, Protocol):
    """A model to convert.

    Attributes:
        kind: the format, for the user to read.
        folder: its folder.
        config: the transformers config of the model.
        metadata_folder: the folder with the model's tokenizer and generation config, None without.
        note: a remark for the user, or empty.
    """

    kind: str
    folder: Path
    config: Any
    metadata_folder: Path | None
    note: str

    def bind(self, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]) -> None:
        """Finds the tensors of the model, whose names and shapes are `expected`.

        Raises:
            CheckpointError: the folder holds a tensor twice, or two different values of one.
        """

    def names(self) -> list[str]:
        """Returns the bound tensors, and those of the folder that the model does not have."""


@runtime_checkable
class HasByteSpans(Protocol):
    """Tensors of which some lie in files byte by byte as they are to be written."""

    def span(self, name: str) -> ByteSpan | None: ...


class CastTensors:
    """The tensors of a reader, those of floating point cast to `dtype` unless it is None."""

    def __init__(self, tensors: TensorReader, dtype: torch.dtype | None) -> None:
        self._tensors, self._dtype = tensors, dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._tensors.dtype(name)
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def span(self, name: str) -> ByteSpan | None:
        """Returns the bytes of a tensor that keeps its dtype, None for others."""
        if not isinstance(self._tensors, HasByteSpans):
            return None
        return self._tensors.span(name) if self.dtype(name) == self._tensors.dtype(name) else None

    def read(self, name: str, index: Index | None = None) -> Tensor:
        exact = self._tensors.read(name, index)
        cast = exact.to(self.dtype(name))
        if cast.dtype == torch.float16 != exact.dtype and not torch.equal(
            cast.isfinite(), exact.isfinite()
        ):
            largest = float(exact.abs().max())
            raise CheckpointError(
                f"{name} contains {largest:.4g}, which exceeds the range of fp16; "
                "use --dtype bf16 or fp32"
            )
        return cast


def nbytes(tensors: TensorReader, name: str) -> int:
    """Returns the size of a tensor in bytes."""
    return math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize


def read_row_blocks(tensors: TensorReader, name: str) -> Iterator[Tensor]:
    """Yields the rows of a tensor in order, about BLOCK_BYTES at a time."""
    shape = tensors.shape(name)
    if not shape or not math.prod(shape):
        yield tensors.read(name)
        return
    row_bytes = max(1, nbytes(tensors, name) // shape[0])
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        yield tensors.read(name, (slice(start, min(start + step, shape[0])),))


def tensors_equal(tensors: TensorReader, one: str, other: str) -> bool:
    """Returns whether two tensors have the same shape and values."""
    if tensors.shape(one) != tensors.shape(other):
        return False
    blocks = zip(read_row_blocks(tensors, one), read_row_blocks(tensors, other), strict=True)
    return all(torch.equal(a, b) for a, b in blocks)


class HuggingFaceFolder:
    """A folder of safetensors or .bin files with a config.json."""

    note = ""

    def __init__(self, folder: Path, config: Any, kind: str = "Hugging Face folder") -> None:
        self.folder, self.config, self.kind = folder, config, kind
        self.metadata_folder: Path | None = folder
        self._tensors = HFFolder(folder)
        self._name_map = {name: name for name in self._tensors.names()}

    def bind(self, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]) -> None:
        """Finds the tensors of the model; drops buffers and a copy of a tied embedding."""
        self._name_map = map_names(self._tensors.names(), architecture, expected, self.folder)
        hint = "set tie_word_embeddings to false in its config.json, or remove the tensor"
        drop_tied_head(self, self._name_map, architecture, folder=self.folder, hint=hint)

    def names(self) -> list[str]:
        return list(self._name_map)

    def span(self, name: str) -> ByteSpan | None:
        """Returns the bytes of a file that are the tensor, None for .bin files."""
        return self._tensors.span(self._name_map[name])

    def file(self, name: str) -> Path:
        """Returns the file that holds the tensor."""
        return self._tensors.file(self._name_map[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._name_map[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(self._name_map[name])

    def read(self, name: str, index: Index | None = None) -> Tensor:
        return self._tensors.read(self._name_map[name], index)


def open_folder(folder: Path, *, verify_hashes: bool) -> HuggingFaceFolder:
    """Opens a folder with a config.json; `verify_hashes` compares our files with their manifest."""
    config = load_hf_config(str(folder))
    if not train_state_path(folder).exists() and not (folder / manifest.MANIFEST).exists():
        return HuggingFaceFolder(folder, config)
    problem = manifest.find_problem(folder, hashes=True) if verify_hashes else None
    if problem is not None:
        raise CheckpointError(f"{folder} {problem}; choose another checkpoint")
    return HuggingFaceFolder(folder, config, "megatrain checkpoint")


def map_names(
    stored: list[str],
    architecture: TransformerConfig,
    expected: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> dict[str, str]:
    """Returns the name in the folder of each tensor; tensors that the model lacks keep theirs.

    Raises CheckpointError if the folder contains a tensor under two names.
    """
    head = f"{architecture.names['head'].name}.weight"
    name_map: dict[str, str] = {}
    found = set(stored)
    for name in {**expected, head: ()}:
        candidates = stored_names(name, architecture, found)
        if len(candidates) > 1:
            raise CheckpointError(
                f"{folder} contains {name} twice, as {candidates[0]} and as {candidates[1]}"
            )
        if candidates:
            name_map[name] = candidates[0]
    known = set(name_map.values())
    return name_map | {n: n for n in stored if n not in known and not BUFFERS.search(n)}


def drop_tied_head(
    tensors: TensorReader,
    name_map: dict[str, str],
    architecture: TransformerConfig,
    *,
    folder: Path,
    hint: str,
) -> None:
    """Removes the head from the map if the model ties it; raises if its values differ."""
    head, embedding = (f"{architecture.names[role].name}.weight" for role in ("head", "embedding"))
    if not architecture.tied or head not in name_map:
        return
    if embedding not in name_map or not tensors_equal(tensors, head, embedding):
        raise CheckpointError(
            f"{folder} contains {head} with other values than the embedding, "
            f"but its config ties them; {hint}"
        )
    del name_map[head]


def check_coverage(
    source: Source, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]
) -> None:
    """Raises CheckpointError unless the source has exactly the expected tensors and shapes."""
    found = set(source.names())
    missing, unexpected = sorted(set(expected) - found), sorted(found - set(expected))
    problems = []
    if missing:
        problems.append(f"lacks {join_names(missing, limit=5)}")
    if unexpected:
        problems.append(
            f"contains {join_names(unexpected, limit=5)}, which the "
            f"{architecture.model_type} of its config does not have"
        )
    if problems:
        raise CheckpointError(f"{source.folder} {' and '.join(problems)}")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.folder} contains {name} of shape {source.shape(name)}, "
                f"but its config requires {shape}"
            )
