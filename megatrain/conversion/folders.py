"""Folders that hold a model under its Hugging Face names: transformers' own, and our checkpoints, which are such folders and more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint import manifest
from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.init_from_hf import BUFFERS
from megatrain.checkpoint.retention import select_checkpoint
from megatrain.checkpoint.tensor_io import ByteSpan, Index
from megatrain.checkpoint.train_state import train_state_path
from megatrain.conversion.sources import Readable, row_blocks_of
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig, load_hf_config


class HuggingFaceFolder:
    """A folder of safetensors or .bin files with a config.json."""

    kind = "Hugging Face folder"
    note = ""

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder, self.config = folder, config
        self.extras: Path | None = folder
        self._tensors = HFFolder(folder)
        self._homes = {name: name for name in self._tensors.names()}

    def adopt(self, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]) -> None:
        """Give the tensors the names of a whole causal model, leave out what is no parameter, and refuse what is there twice."""
        self._homes = name_map_of(self._tensors.names(), architecture, expected, self.folder)
        head = f"{architecture.names['head'].name}.weight"
        if architecture.tied and head in self._homes:
            self._check_copy(
                self._homes.pop(head),
                self._homes.get(f"{architecture.names['embedding'].name}.weight"),
            )

    def _check_copy(self, head: str, embedding: str | None) -> None:
        if embedding is None or not same_values(self._tensors, head, embedding):
            raise CheckpointError(
                f"{self.folder} holds {head} with other values than the embedding, and its config ties them; "
                "set tie_word_embeddings to false in its config.json, or remove the tensor"
            )

    def names(self) -> list[str]:
        return list(self._homes)

    def span(self, name: str) -> ByteSpan | None:
        """The bytes of a file that are the tensor, if they are to be had as they are."""
        return self._tensors.span(self._homes[name])

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._tensors.file(self._homes[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._homes[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(self._homes[name])

    def read(self, name: str, index: Index | None = None) -> Tensor:
        return self._tensors.read(self._homes[name], index)


class Checkpoint(HuggingFaceFolder):
    """A checkpoint of ours; its files are checked against its manifest when it is to be trusted."""

    kind = "megatrain checkpoint"

    def __init__(self, folder: Path, config: Any, *, checked: bool) -> None:
        wrong = manifest.find_problem(folder, hashes=True) if checked else None
        if wrong is not None:
            raise CheckpointError(f"{folder} {wrong}; choose another checkpoint")
        super().__init__(folder, config)


def name_map_of(
    names: list[str],
    architecture: TransformerConfig,
    expected: dict[str, tuple[int, ...]],
    folder: Path,
) -> dict[str, str]:
    """Which tensor of a folder each of the model's is: by its name, without the base model's prefix, or by a former name."""
    prefix = architecture.names["embedding"].name.partition(".")[0] + "."
    homes: dict[str, str] = {}
    for name in names:
        whole = architecture.former_names.get(name, name)
        if whole not in expected and prefix + whole in expected:
            whole = prefix + whole
        if whole not in expected and BUFFERS.search(name):
            continue
        if whole in homes:
            raise CheckpointError(f"{folder} holds {whole} twice, as {homes[whole]} and as {name}")
        homes[whole] = name
    return homes


def same_values(tensors: Readable, one: str, other: str) -> bool:
    """Whether two tensors are equal, block by block."""
    if tensors.shape(one) != tensors.shape(other):
        return False
    return all(
        torch.equal(a, b)
        for a, b in zip(row_blocks_of(tensors, one), row_blocks_of(tensors, other), strict=True)
    )


def check_coverage(
    source: Any, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]
) -> None:
    """Every parameter of the architecture is there in its shape, and nothing else is."""
    found = set(source.names())
    missing, unexpected = sorted(set(expected) - found), sorted(found - set(expected))
    if missing or unexpected:
        words = [f"lacks {_list(missing)}"] * bool(missing) + [
            f"holds {_list(unexpected)}, for which a {architecture.model_type} of its config has no place"
        ] * bool(unexpected)
        raise CheckpointError(f"{source.folder} {' and '.join(words)}")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.folder} holds {name} of shape {source.shape(name)}, and its config makes it {shape}"
            )


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def model_folder(path: Path) -> Path:
    """The folder itself, or the chosen checkpoint of a run's folder or of a folder of checkpoints."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    return (
        select_checkpoint(path)
        if any(path.glob("step-*")) or any(path.glob("checkpoints/step-*"))
        else path
    )


def open_folder(path: Path, *, checked: bool) -> HuggingFaceFolder:
    """A folder with a config.json, as the kind it is."""
    config = load_hf_config(str(path))
    if train_state_path(path).exists() or (path / manifest.MANIFEST).exists():
        return Checkpoint(path, config, checked=checked)
    return HuggingFaceFolder(path, config)
