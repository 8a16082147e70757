"""A checkpoint opened for reading: `megatrain.Checkpoint` of the Python API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from megatrain.checkpoint import manifest, peft
from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.tensor_io import SafetensorsFile
from megatrain.checkpoint.train_state import read_train_state, train_state_path
from megatrain.errors import CheckpointError


class Checkpoint:
    """A checkpoint of a run.

    Args:
        path: a checkpoint's folder, or a run folder, whose newest complete checkpoint is opened.

    Attributes:
        path: the checkpoint's folder.

    Raises:
        CheckpointError: the folder is neither, or the run has no complete checkpoint.

    Example, with `run` the folder of a run of three steps:

        >>> from megatrain.checkpoint.checkpoint import Checkpoint
        >>> checkpoint = Checkpoint(run)
        >>> checkpoint.verify()
        >>> checkpoint.path.name, checkpoint.step
        ('step-00000003', 3)
        >>> tensors = checkpoint.tensors
        >>> "model.norm.weight" in tensors, tensors["model.norm.weight"].dtype
        (True, torch.float32)
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        folder, state = self.path / "checkpoints", train_state_path(self.path)
        if folder.is_dir():
            newest, skipped = manifest.find_newest(folder)
            if newest is None:
                reasons = "".join(f"; {reason}" for reason in skipped)
                raise CheckpointError(f"{path} contains no complete checkpoint{reasons}")
            self.path = newest
        elif not ((self.path / manifest.MANIFEST).exists() or state.exists()):
            raise CheckpointError(f"{path} must be the folder of a checkpoint or of a run")

    @cached_property
    def step(self) -> int:
        """Steps of the run when the checkpoint was saved.

        Raises CheckpointError if `train_state.json` is missing or damaged.
        """
        return read_train_state(self.path).state.step

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The model's tensors by their Hugging Face names; each access reads one from its file.

        For a LoRA run these are the adapter's. Raises CheckpointError if a file is missing or
        damaged.
        """
        adapter = self.path / peft.MODEL
        return _Tensors(SafetensorsFile(adapter) if adapter.exists() else HFFolder(self.path))

    def verify(self, level: Literal["sizes", "full"] = "full") -> None:
        """Checks the files against the manifest.

        Args:
            level: `sizes` compares only the files' sizes; `full` reads them and compares hashes.

        Raises:
            CheckpointError: a file is missing or changed; the message names the first one.
        """
        problem = manifest.find_problem(self.path, hashes=level == "full")
        if problem is not None:
            raise CheckpointError(f"{self.path} {problem}")


class _Tensors(Mapping[str, Tensor]):
    """Tensors that are read when they are accessed."""

    def __init__(self, source: HFFolder | SafetensorsFile) -> None:
        self._source = source
        self._names = source.names()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._source:
            raise KeyError(name)
        tensor = self._source.view(name).clone()
        self._source.release(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._source

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
