"""DeepSpeed's universal checkpoint as a source: each parameter whole in files of its own, as `ds_to_universal` writes them.

    zero/NAME/fp32.pt  exp_avg.pt  exp_avg_sq.pt  step.pt      {"param": tensor} each, or the tensor itself

NAME is a parameter's name in the trained module; a transformers model's are Hugging Face's.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.tensor_io import Index, is_plain, load_without_code, release
from megatrain.conversion.folders import name_map_of
from megatrain.conversion.megatron_legacy import InertObject
from megatrain.conversion.to_checkpoint import Moments
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig

_STAND_INS = [(InertObject, "deepspeed.checkpoint.universal_checkpoint.SubparamShape")]
_MOMENTS = ("exp_avg", "exp_avg_sq")


class _State:
    """One of the files of each parameter, as tensors by Hugging Face's names."""

    def __init__(self, folder: Path, homes: dict[str, str], state: str) -> None:
        self.folder, self.homes, self.state = folder, homes, state
        self._last: tuple[str, Tensor, bool] | None = None

    def path(self, name: str) -> Path:
        return self.folder / "zero" / self.homes[name] / f"{self.state}.pt"

    def _tensor(self, name: str) -> tuple[Tensor, bool]:
        """The tensor, and whether it is mapped."""
        if self._last is None or self._last[0] != name:
            self._last = (name, *_read(self.path(name)))
        return self._last[1:]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name)[0].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name)[0].dtype

    def read(self, name: str, index: Index | None = None) -> Tensor:
        tensor, mapped = self._tensor(name)
        part = tensor[index or ()].clone(memory_format=torch.contiguous_format)
        if mapped:
            release(tensor)
        return part


class UniversalCheckpoint(_State):
    """The source."""

    kind = "DeepSpeed universal checkpoint"
    note = ""

    def __init__(self, folder: Path, config: Any, *, extras: Path | None) -> None:
        super().__init__(folder, {}, "fp32")
        self.config, self.extras = config, extras
        zero = folder / "zero"
        self._held = sorted(path.name for path in zero.iterdir() if path.is_dir())
        for name in self._held:
            if not (zero / name / "fp32.pt").is_file():
                raise CheckpointError(f"{zero / name} lacks fp32.pt")

    def adopt(self, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]) -> None:
        """Find the model's tensors; a copy of a tied embedding is left out when it is one."""
        plain = {name.removeprefix("module."): name for name in self._held}
        if len(plain) != len(self._held):
            raise CheckpointError(
                f"{self.folder} holds parameters with the prefix module. and without"
            )
        self.homes = {
            ours: plain[theirs]
            for ours, theirs in name_map_of(
                list(plain), architecture, expected, self.folder
            ).items()
        }
        head, embedding = (
            f"{architecture.names[role].name}.weight" for role in ("head", "embedding")
        )
        if architecture.tied and head in self.homes:
            if embedding not in self.homes or not torch.equal(
                self.read(head), self.read(embedding)
            ):
                raise CheckpointError(
                    f"{self.folder} holds {head} with other values than the embedding, and --config ties them"
                )
            del self.homes[head]

    def names(self) -> list[str]:
        return list(self.homes)

    def moments(self) -> Moments:
        """Adam's; CheckpointError where only some parameters have them, or where none says how many updates there were."""
        states = {state: _State(self.folder, self.homes, state) for state in _MOMENTS}
        there = [state.path(name).is_file() for state in states.values() for name in self.homes]
        if not any(there):
            return Moments({}, 0)
        for state in states.values():
            for name in self.homes:
                if not state.path(name).is_file():
                    raise CheckpointError(
                        f"{self.folder} lacks {state.state}.pt of {name} and has it of others"
                    )
                if state.shape(name) != self.shape(name):
                    raise CheckpointError(
                        f"{state.path(name)} is of shape {state.shape(name)} and the parameter of {self.shape(name)}"
                    )
        return Moments(dict(states), self._updates())

    def _updates(self) -> int:
        found = set()
        for name in self.homes:
            path = self.folder / "zero" / self.homes[name] / "step.pt"
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing, which says how many updates the moments are of"
                )
            value = _plain(load_without_code(path, list(_STAND_INS)))
            found.add(
                float(value)
                if isinstance(value, int | float)
                or (isinstance(value, Tensor) and value.numel() == 1)
                else -1.0
            )
        count = max(found)
        if len(found) != 1 or not 0 <= count < 2**40 or count != int(count):
            raise CheckpointError(
                f"{self.folder} has parameters after different numbers of updates, or of none that is a number: {sorted(found)[:4]}"
            )
        return int(count)


def _plain(loaded: Any) -> Any:
    return loaded["param"] if isinstance(loaded, dict) and "param" in loaded else loaded


def _read(path: Path) -> tuple[Tensor, bool]:
    tensor = _plain(load_without_code(path, list(_STAND_INS)))
    if not isinstance(tensor, Tensor) or not is_plain(tensor) or not tensor.dtype.is_floating_point:
        raise CheckpointError(f"{path} holds no plain tensor of floating point")
    if tensor.numel() * tensor.dtype.itemsize > path.stat().st_size:
        raise CheckpointError(f"{path} holds a tensor that is larger than the file")
    return tensor.detach(), zipfile.is_zipfile(path)
