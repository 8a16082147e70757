"""The tensors of a Hugging Face model folder, read by name and slice.

The folder holds one or many safetensors files, or the older .bin files. Opening it checks that each
tensor is in one file and that the index and the files list the same tensors. No name may lead out
of the folder. Files are mapped: a rank reads only the slices that it needs.
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
    reject_duplicates,
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
"""In the order in which transformers looks for them."""


def shard_names(count: int) -> list[str]:
    """Returns the names of a model's safetensors files, in order."""
    if count == 1:
        return [_FORMATS[SafetensorsFile].single]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_weight_map(folder: Path, weight_map: Mapping[str, str], *, total_size: int) -> None:
    """Writes the index of a model in several files: the file of each tensor.

    `total_size` is in bytes.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    (folder / _FORMATS[SafetensorsFile].index_name).write_text(
        json.dumps(index, indent=1), encoding="utf-8"
    )


class HFFolder:
    """The tensors of a Hugging Face folder.

    Attributes:
        folder: its path.
        files: the files of tensors, in order.
        bytes_read: bytes of tensors and slices that `read` and `copy` have returned.

    Raises CheckpointError if a file or tensor is missing, damaged, duplicate or out of the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self.files = self._open()
        self._file_of: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.names():
                if name in self._file_of:
                    names = f"{self._file_of[name].path.name} and {file.path.name}"
                    raise CheckpointError(f"{self.folder} contains {name} twice: in {names}")
                self._file_of[name] = file

    def names(self) -> list[str]:
        """Returns the names of all tensors, in the order of the files."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._file(name).dtype(name)

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def file(self, name: str) -> Path:
        """Returns the file that holds the tensor."""
        return self._file(name).path

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Returns the tensor, or the part at `index`, as a contiguous copy on the CPU."""
        tensor = self.view(name)[index or ()].clone(memory_format=torch.contiguous_format)
        self.release(name)
        self.bytes_read += tensor.nbytes
        return tensor

    def copy(self, name: str, index: Index, *, to: Tensor) -> None:
        """Writes the part at `index` into a tensor of its shape, of any dtype and device."""
        part = self.view(name)[index]
        self.bytes_read += part.nbytes
        to.copy_(part)
        self.release(name)

    def view(self, name: str) -> Tensor:
        """Returns the mapped tensor, which must not be written to; call `release` afterwards."""
        return self._file(name).view(name)

    def release(self, name: str) -> None:
        """Frees the memory of the pages that views of the tensor have read."""
        self._file(name).release(name)

    def span(self, name: str) -> ByteSpan | None:
        """Returns the tensor's bytes in its file; None if that is not a safetensors file."""
        file = self._file(name)
        return file.span(name) if isinstance(file, SafetensorsFile) else None

    def _file(self, name: str) -> TensorFile:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self._file_of[name]

    def _open(self) -> list[TensorFile]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder")
        for kind, names in _FORMATS.items():
            has_single = (self.folder / names.single).exists()
            has_index = (self.folder / names.index_name).exists()
            if has_single and has_index:
                raise CheckpointError(
                    f"{self.folder} contains both {names.single} and {names.index_name}, possibly "
                    "of different models; remove one of them"
                )
            if has_single:
                return [kind(self.folder / names.single)]
            if has_index:
                return self._open_shards(kind, names)
        if (self.folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{self.folder} contains adapters without their base model; merge them with "
                "`megatrain finetune CONFIG --merge`"
            )
        if newest := max(retention.list_checkpoints(self.folder / "checkpoints"), default=None):
            raise CheckpointError(
                f"{self.folder} is a run folder, not a model; use one of its checkpoints, such as "
                f"{newest}"
            )
        expected = ", ".join(name for names in _FORMATS.values() for name in names[:2])
        raise CheckpointError(f"{self.folder} contains no model; expected one of {expected}")

    def _open_shards(
        self, kind: type[SafetensorsFile] | type[BinFile], names: _Format
    ) -> list[TensorFile]:
        weight_map = _read_index(self.folder / names.index_name)
        listed = sorted(set(weight_map.values()))
        for path in sorted(self.folder.glob(names.shards)):
            if path.name not in listed:
                raise CheckpointError(
                    f"{self.folder} contains {path.name}, which {names.index_name} does not list"
                )
        files: list[TensorFile] = [kind(self.folder / name) for name in listed]
        for file in files:
            _check_shard(file, weight_map, names.index_name)
        return files


def _check_shard(file: TensorFile, weight_map: Mapping[str, str], index_name: str) -> None:
    listed = {name for name, file_name in weight_map.items() if file_name == file.path.name}
    stored = set(file.names())
    if listed - stored:
        raise CheckpointError(
            f"{file.path} lacks {min(listed - stored)}, which {index_name} lists for it"
        )
    for name in sorted(stored - listed):
        if name in weight_map:
            raise CheckpointError(
                f"{file.path.parent} contains {name} twice: in {file.path.name} and "
                f"{weight_map[name]}"
            )
        raise CheckpointError(f"{file.path} contains {name}, which {index_name} does not list")


def _read_index(path: Path) -> dict[str, str]:
    """Returns the file of each tensor; raises CheckpointError if one is outside the folder."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=reject_duplicates)
        weight_map = content["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a readable index: {type(error).__name__} {str(error)[:120]}"
        ) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is not a readable index: weight_map must map names to files")
    for name, file in weight_map.items():
        if not is_file_name(file):
            raise CheckpointError(
                f"{path} lists {name[:120]} in {str(file)[:120]!r}, which is not the name of a "
                "file in its folder"
            )
    return weight_map


def is_file_name(value: object) -> bool:
    """Returns True for the name of a file in the same folder, without a path."""
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    return Path(value).name == value and "\0" not in value and "\\" not in value
