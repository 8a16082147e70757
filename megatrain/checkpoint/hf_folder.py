"""A model's folder read by tensor name and slice: one or many safetensors files, or the .bin files that came before them.

Opening one checks it as a whole: each tensor is in one file, the index and the files tell of the same tensors, and no
name leads out of the folder. What is read is mapped, so that a rank pays for the slices it asks for and for nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatrain.checkpoint import retention
from megatrain.checkpoint.tensor_io import (
    BinFile,
    ByteSpan,
    Index,
    SafetensorsFile,
    TensorFile,
    no_name_twice,
)
from megatrain.errors import CheckpointError


class _Format(NamedTuple):
    single: str
    index_name: str
    shards: str


_FORMATS: dict[type[SafetensorsFile] | type[BinFile], _Format] = {
    SafetensorsFile: _Format(
        "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"
    ),
    BinFile: _Format(
        "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"
    ),
}
"""Looked for in this order, as transformers does."""


def shard_names(count: int) -> list[str]:
    """What a model's safetensors files are called, in their order."""
    names = _FORMATS[SafetensorsFile]
    return (
        [names.single]
        if count == 1
        else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )


def write_weight_map(folder: Path, homes: Mapping[str, str], *, total_size: int) -> None:
    """Say which file each tensor is in, where they are several files; `total_size` in bytes."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(homes)}
    (folder / _FORMATS[SafetensorsFile].index_name).write_text(
        json.dumps(index, indent=1), encoding="utf-8"
    )


class HFFolder:
    """The tensors of a Hugging Face folder.

    Attributes:
        folder: where they are.
        files: what they are in, in order.
        bytes_read: bytes of all tensors and slices that `read` and `copy` have taken from the files.

    Raises CheckpointError for whatever is missing, damaged, there twice or named outside the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._homes: dict[str, TensorFile] = {}
        self.files = self._open()
        for file in self.files:
            for name in file.names():
                if name in self._homes:
                    raise CheckpointError(
                        f"{self.folder} holds {name} twice, in {self._homes[name].path.name} and {file.path.name}"
                    )
                self._homes[name] = file

    def names(self) -> list[str]:
        """In the order of the files."""
        return list(self._homes)

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._home(name).dtype(name)

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._home(name).path

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """The tensor, or the part at `index`, as a contiguous CPU tensor with memory of its own."""
        tensor = self.view(name)[index or ()].clone(memory_format=torch.contiguous_format)
        self._home(name).let_go(name)
        self.bytes_read += tensor.nbytes
        return tensor

    def copy(self, name: str, index: Index, *, to: Tensor) -> None:
        """Write the part at `index` into a tensor of its shape, whatever its dtype and device, with no copy in between on a CPU."""
        part = self.view(name)[index]
        self.bytes_read += part.nbytes
        to.copy_(part)
        self._home(name).let_go(name)

    def view(self, name: str) -> Tensor:
        """The tensor as it lies in its file, mapped; not to be written to. What is looked at is read, and nothing else."""
        return self._home(name).view(name)

    def span(self, name: str) -> ByteSpan | None:
        """The bytes of a file that are the tensor, where the file is of safetensors."""
        home = self._home(name)
        return home.span(name) if isinstance(home, SafetensorsFile) else None

    def _home(self, name: str) -> TensorFile:
        if name not in self._homes:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        return self._homes[name]

    def _open(self) -> list[TensorFile]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder")
        for kind, names in _FORMATS.items():
            single, index = (
                (self.folder / names.single).exists(),
                (self.folder / names.index_name).exists(),
            )
            if single and index:
                raise CheckpointError(
                    f"{self.folder} holds {names.single} and {names.index_name}, which may be of different models; "
                    "remove the one that is not meant"
                )
            if single:
                return [kind(self.folder / names.single)]
            if index:
                return self._open_shards(kind, names)
        if (self.folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{self.folder} holds adapters and not the model they stand on; `megatrain finetune CONFIG --merge` makes one of both"
            )
        if newest := max(retention.checkpoints(self.folder / "checkpoints"), default=None):
            raise CheckpointError(
                f"{self.folder} is a run's folder and no model's; name one of its checkpoints, such as {newest}"
            )
        raise CheckpointError(
            f"{self.folder} holds no model: neither {' nor '.join(n for names in _FORMATS.values() for n in names[:2])}"
        )

    def _open_shards(
        self, kind: type[SafetensorsFile] | type[BinFile], names: _Format
    ) -> list[TensorFile]:
        weight_map = _read_index(self.folder / names.index_name)
        listed = sorted(set(weight_map.values()))
        for path in sorted(self.folder.glob(names.shards)):
            if path.name not in listed:
                raise CheckpointError(
                    f"{self.folder} holds {path.name}, of which {names.index_name} does not tell"
                )
        files: list[TensorFile] = [kind(self.folder / name) for name in listed]
        for file in files:
            told = {name for name, home in weight_map.items() if home == file.path.name}
            held = set(file.names())
            if told - held:
                raise CheckpointError(
                    f"{file.path} does not hold {min(told - held)}, as {names.index_name} says"
                )
            for name in sorted(held - told):
                if name in weight_map:
                    raise CheckpointError(
                        f"{self.folder} holds {name} twice: it is in {file.path.name} as well as in {weight_map[name]}"
                    )
                raise CheckpointError(
                    f"{file.path} holds {name}, of which {names.index_name} does not tell"
                )
        return files


def _read_index(path: Path) -> dict[str, str]:
    """Which file each tensor is in; the files are plain names in the index's own folder."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_name_twice)[
            "weight_map"
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no readable index: {type(error).__name__} {str(error)[:120]}"
        ) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} is no readable index: its weight_map is not a mapping of names to files"
        )
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or file in ("", ".", "..")
            or Path(file).name != file
            or "\0" in file
            or "\\" in file
        ):
            raise CheckpointError(
                f"{path} has {name[:120]} in {str(file)[:120]!r}, which is not the name of a file in its folder"
            )
    return weight_map
