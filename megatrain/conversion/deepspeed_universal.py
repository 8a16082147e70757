"""DeepSpeed's universal checkpoint as a source: a folder with the files of each whole parameter.

    zero/NAME/fp32.pt  exp_avg.pt  exp_avg_sq.pt  step.pt      {"param": tensor} each, or the tensor

`ds_to_universal` writes it. NAME is a parameter's name in the trained module, which for a
transformers model is the Hugging Face name.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.tensor_io import Index, is_plain, load_without_code, release
from megatrain.conversion.megatron_legacy import InertObject
from megatrain.conversion.sources import drop_tied_head, map_names
from megatrain.conversion.to_checkpoint import Moments
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig

_STAND_INS = [(InertObject, "deepspeed.checkpoint.universal_checkpoint.SubparamShape")]
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAX_UPDATES = 2**40


class _StateTensors:
    """One of the files of each parameter, as tensors by Hugging Face names."""

    def __init__(self, folder: Path, name_map: dict[str, str], state: str) -> None:
        self.folder, self.name_map, self.state = folder, name_map, state
        self._cached: tuple[str, Tensor, bool] | None = None

    def path(self, name: str) -> Path:
        return self.folder / "zero" / self.name_map[name] / f"{self.state}.pt"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._load(name)[0].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._load(name)[0].dtype

    def read(self, name: str, index: Index | None = None) -> Tensor:
        tensor, is_mapped = self._load(name)
        part = tensor[index or ()].clone(memory_format=torch.contiguous_format)
        if is_mapped:
            release(tensor)
        return part

    def _load(self, name: str) -> tuple[Tensor, bool]:
        """Returns the tensor and whether it is memory-mapped."""
        if self._cached is None or self._cached[0] != name:
            self._cached = (name, *_load_tensor(self.path(name)))
        return self._cached[1:]


class UniversalCheckpoint(_StateTensors):
    """A universal checkpoint."""

    kind = "DeepSpeed universal checkpoint"
    note = ""

    def __init__(self, folder: Path, config: Any, *, metadata_folder: Path | None) -> None:
        super().__init__(folder, {}, "fp32")
        self.config, self.metadata_folder = config, metadata_folder
        self._stored = sorted(path.name for path in (folder / "zero").iterdir() if path.is_dir())
        for name in self._stored:
            if not (folder / "zero" / name / "fp32.pt").is_file():
                raise CheckpointError(f"{folder / 'zero' / name} lacks fp32.pt")

    def bind(self, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]) -> None:
        """Finds the tensors of the model; drops a copy of a tied embedding."""
        stored = {name.removeprefix("module."): name for name in self._stored}
        if len(stored) != len(self._stored):
            raise CheckpointError(
                f"{self.folder} contains parameters with the prefix module. and without"
            )
        name_map = map_names(list(stored), architecture, expected, self.folder)
        self.name_map = {name: stored[bare] for name, bare in name_map.items()}
        hint = "name a config with tie_word_embeddings false with --config"
        drop_tied_head(self, self.name_map, architecture, folder=self.folder, hint=hint)

    def names(self) -> list[str]:
        return list(self.name_map)

    def moments(self) -> Moments:
        """Returns Adam's moments, empty if the checkpoint has none.

        Raises CheckpointError if only some parameters have them, or if shapes or updates differ.
        """
        states = {state: _StateTensors(self.folder, self.name_map, state) for state in _MOMENTS}
        if not any(s.path(name).is_file() for s in states.values() for name in self.name_map):
            return Moments({}, 0)
        for state in states.values():
            for name in self.name_map:
                if not state.path(name).is_file():
                    raise CheckpointError(
                        f"{self.folder} lacks {state.state}.pt of {name}, but has it for others"
                    )
                if state.shape(name) != self.shape(name):
                    raise CheckpointError(
                        f"{state.path(name)} has shape {state.shape(name)}, but the parameter has "
                        f"{self.shape(name)}"
                    )
        return Moments(dict(states), self._read_updates())

    def _read_updates(self) -> int:
        counts = set()
        for stored in self.name_map.values():
            path = self.folder / "zero" / stored / "step.pt"
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, which has the number of updates")
            value = _unwrap(load_without_code(path, list(_STAND_INS)))
            is_number = isinstance(value, int | float) or (
                isinstance(value, Tensor) and value.numel() == 1
            )
            counts.add(float(value) if is_number else -1.0)
        count = max(counts)
        if len(counts) != 1 or not 0 <= count < _MAX_UPDATES or count != int(count):
            raise CheckpointError(
                f"the step.pt files of {self.folder} contain different or invalid numbers of "
                f"updates: {sorted(counts)[:4]}"
            )
        return int(count)


def _unwrap(loaded: Any) -> Any:
    return loaded["param"] if isinstance(loaded, dict) and "param" in loaded else loaded


def _load_tensor(path: Path) -> tuple[Tensor, bool]:
    """Returns a tensor of floating point and whether it is memory-mapped."""
    tensor = _unwrap(load_without_code(path, list(_STAND_INS)))
    if not isinstance(tensor, Tensor) or not is_plain(tensor) or not tensor.dtype.is_floating_point:
        raise CheckpointError(f"{path} does not contain a plain tensor of floating point")
    if tensor.numel() * tensor.dtype.itemsize > path.stat().st_size:
        raise CheckpointError(f"{path} contains a tensor that is larger than the file")
    return tensor.detach(), zipfile.is_zipfile(path)
