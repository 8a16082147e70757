"""One conversion from its source to a published folder, the parts in order.

What is written lies in a hidden folder beside the target until it is whole and proven; then it is renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatrain import __version__
from megatrain.checkpoint import manifest
from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.conversion import verify as verify_module
from megatrain.conversion.detect_format import Hints, open_source
from megatrain.conversion.folders import check_coverage
from megatrain.conversion.hf_metadata import write_descriptions
from megatrain.conversion.progress import ProgressBar
from megatrain.conversion.sources import CastTensors, Source, nbytes
from megatrain.conversion.to_checkpoint import OptimizerFiles
from megatrain.conversion.writer import BackgroundSync, plan_shards, write_model
from megatrain.errors import CheckpointError
from megatrain.models.classification_config import any_architecture
from megatrain.models.config import TransformerConfig, load_hf_config
from megatrain.models.counts import parameter_shapes
from megatrain.ops.dtypes import DTYPES

NAME = "conversion.json"
WORKING_BYTES = 1 << 30
"""Memory beside the largest tensor in fp32: libraries, blocks being read and written, activations of the prompts."""


@dataclass(frozen=True)
class ConversionRequest:
    """What is wanted.

    Attributes:
        to: "hf" for a clean Hugging Face folder, "checkpoint" for one that a run resumes; None chooses by the source's kind.
        dtype: bf16, fp16 or fp32; each tensor keeps its own when None.
        verify: prove the target before it is published.
        config: folder or config.json of the same model, for a source without one.
        tokenizer: folder whose tokenizer goes with the target, instead of the source's.
        vocab_size: rows of the embedding that are no padding, for a source that does not say it.
    """

    source: Path
    target: Path
    to: Literal["hf", "checkpoint"] | None = None
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    max_shard_bytes: int = 5 * 10**9
    verify: bool = True
    config: str | None = None
    tokenizer: Path | None = None
    vocab_size: int | None = None


_TO_CHECKPOINT = ("Hugging Face folder", "DeepSpeed universal checkpoint")
Say = Callable[[str], None]


def convert(request: ConversionRequest, *, say: Say) -> Path:
    """Write request.target and return it; on any failure it does not appear."""
    check_target(request.target)
    source = open_source(
        request.source, Hints(request.config, request.tokenizer, request.vocab_size)
    )
    architecture = any_architecture(source.config)
    if architecture.classifier is not None:
        raise CheckpointError(
            f"{source.folder} is a classifier, and language models are converted; transformers loads the folder as it is"
        )
    expected = parameter_shapes(architecture)
    source.adopt(architecture, expected)
    check_coverage(source, architecture, expected)
    say(f"{source.folder}: a {source.kind} of a {architecture.model_type}")
    if source.note:
        say(f"  note    {source.note}")
    dtype = None if request.dtype is None else DTYPES[request.dtype]
    to = request.to or ("checkpoint" if source.kind in _TO_CHECKPOINT else "hf")
    work = _Work(request, source, architecture, dtype, to, list(expected), say)
    work.announce()
    with hidden_folder(request.target) as folder:
        work.write(folder)
        publish(folder, request.target)
    say(f"wrote {request.target}")
    return request.target


def check_target(target: Path) -> None:
    """A target is a new name, or an empty folder."""
    if target.is_dir() and not target.is_symlink():
        if any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty; give a new folder")
    elif target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} is there and no folder; give a new one")


@contextlib.contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside the target, which is gone at the end; what a killed conversion left there is cleared first."""
    folder = target.parent / f".converting-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{target} is being written by another conversion; wait for it or give another folder"
            ) from None
        try:
            _clear(folder)
            yield folder
        except OSError as error:
            raise CheckpointError(
                f"{target} cannot be written: {error.strerror or error}; nothing was published"
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def publish(folder: Path, target: Path) -> None:
    """Make the folder the target in one step, on the disk too."""
    for path in folder.rglob("*"):
        manifest.fsync_folder(path)
    manifest.fsync_folder(folder)
    folder.rename(target)
    manifest.fsync_folder(target.parent)


class _Work:
    """A conversion whose source was found good."""

    def __init__(
        self,
        request: ConversionRequest,
        source: Source,
        architecture: TransformerConfig,
        dtype: torch.dtype | None,
        to: str,
        names: list[str],
        say: Say,
    ) -> None:
        self.request, self.source, self.architecture, self.dtype, self.to, self.say = (
            request,
            source,
            architecture,
            dtype,
            to,
            say,
        )
        self.tensors = CastTensors(source, dtype)
        self.shards = plan_shards(names, self.tensors, request.max_shard_bytes)
        self.names = names
        self.optimizer = OptimizerFiles(source, architecture) if to == "checkpoint" else None
        self.num_bytes = sum(nbytes(self.tensors, name) for name in names) + (
            0 if self.optimizer is None else self.optimizer.num_bytes
        )

    def announce(self) -> None:
        """Sizes, and the memory that it will take, before anything is done; refuses a disk that is too small."""
        parameters = sum(
            nbytes(self.source, name) // self.source.dtype(name).itemsize for name in self.names
        )
        largest = max(self.names, key=lambda name: nbytes(self.source, name))
        memory = (
            nbytes(self.source, largest) // self.source.dtype(largest).itemsize * 4 + WORKING_BYTES
        )
        total = self.num_bytes
        files = "1 file" if len(self.shards) == 1 else f"{len(self.shards)} files"
        kind = "a Hugging Face folder" if self.optimizer is None else "a checkpoint to resume from"
        self.say(
            f"  to      {kind}, {len(self.names)} tensors, {parameters:,} parameters, {total / 1e9:.2f} GB in {files}"
            f"{'' if self.optimizer is None else self._of_optimizer(self.optimizer)}"
        )
        self.say(
            f"  memory  at most {memory / 2**30:.2f} GiB; the largest tensor is {largest} of {nbytes(self.source, largest) / 2**30:.2f} GiB"
        )
        if self.dtype in verify_module.WEIGHT_BOUND and any(
            self.source.dtype(name).itemsize > 2 for name in self.names
        ):
            self.say(
                f"  dtype   {self.request.dtype}: rounding changes a weight by at most {verify_module.WEIGHT_BOUND[self.dtype]:.2g} of itself"
            )
        existing = next(
            path
            for path in [self.request.target, *self.request.target.resolve().parents]
            if path.exists()
        )
        free = shutil.disk_usage(existing).free
        if free < total * 1.01 + 2**20:
            raise CheckpointError(
                f"{self.request.target} needs {total / 1e9:.3f} GB and its disk has {free / 1e9:.3f} GB free; nothing was written"
            )

    def _of_optimizer(self, optimizer: OptimizerFiles) -> str:
        states = ", ".join(["masters", *optimizer.moments.states])
        return f" and the optimizer's {states}, after {optimizer.moments.updates:,} updates"

    def write(self, folder: Path) -> None:
        """Everything that the target holds; the disk catches up while it is proven."""
        catcher = BackgroundSync()
        try:
            self._write(folder, catcher)
        finally:
            catcher.wait()

    def _write(self, folder: Path, catcher: BackgroundSync) -> None:
        with ProgressBar(self.num_bytes, self.say) as progress:
            write_model(folder, self.shards, self.tensors, wrote=progress.add, catcher=catcher)
            if self.optimizer is not None:
                self.optimizer.write(folder, wrote=progress.add, catcher=catcher)
            write_descriptions(
                folder, self.source, dtype=self.dtype_name(), tokenizer=self.request.tokenizer
            )
        figures = (
            self._prove(folder)
            if self.request.verify
            else {"proof": None, "sha256_of_tensors": None}
        )
        self._report(folder, figures)
        if self.optimizer is not None:
            self.optimizer.finish(folder, self.source)

    def _prove(self, folder: Path) -> dict[str, Any]:
        written = HFFolder(folder)
        if set(written.names()) != set(self.names):
            raise CheckpointError(
                f"{folder} does not hold the tensors that were written: the disk is not to be trusted"
            )
        hashes = verify_module.check_bytes(written, self.tensors, self.names, folder)
        if self.optimizer is not None:
            self.optimizer.check(folder)
        found = verify_module.check_logits(
            self.source,
            written,
            load_hf_config(str(folder)),
            self.architecture,
            dtype=self.dtype,
            to=self.to,
        )
        self.say(
            f"  proof   {found.tensors} tensors read back as written; logits of {found.source_computed_by} and {found.target_computed_by} differ by "
            f"at most {found.max_logit_difference:.3g} (allowed {found.bound:.3g})"
        )
        if found.rounding_difference is not None:
            self.say(
                f"          rounding to {self.request.dtype} changed logits by at most {found.rounding_difference:.3g}, the largest is {found.largest_logit:.3g}"
            )
        return {"proof": found._asdict(), "sha256_of_tensors": dict(sorted(hashes.items()))}

    def _report(self, folder: Path, figures: dict[str, Any]) -> None:
        import safetensors
        import transformers

        report = {
            "source": str(self.source.folder),
            "source_kind": self.source.kind,
            "to": self.to,
            "model_type": self.architecture.model_type,
            "dtype": self.dtype_name(),
            **figures,
            "versions": {
                "megatrain": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
            },
        }
        (folder / NAME).write_text(json.dumps(report, indent=1), encoding="utf-8")

    def dtype_name(self) -> str:
        """Of most elements, as config.json names it."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.names:
            sizes[self.tensors.dtype(name)] = sizes.get(self.tensors.dtype(name), 0) + nbytes(
                self.tensors, name
            )
        return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
