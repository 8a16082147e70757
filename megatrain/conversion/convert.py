"""Converts a model: source, written folder, verification, publication.

The output is written to a hidden folder next to the target, which is renamed to the target when it
is complete and verified.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.hf_metadata import copy_tokenizer, write_config
from megatrain.conversion import verify as verification
from megatrain.conversion.detect_format import Hints, open_source
from megatrain.conversion.sources import CastTensors, Source, check_coverage, nbytes
from megatrain.conversion.to_checkpoint import OptimizerFiles
from megatrain.conversion.verify import VerificationResult
from megatrain.conversion.writer import BackgroundSync, plan_shards, write_model
from megatrain.errors import CheckpointError
from megatrain.files import flush_to_disk
from megatrain.models.classification_config import any_architecture
from megatrain.models.config import TransformerConfig, load_hf_config
from megatrain.models.counts import parameter_shapes
from megatrain.ops.dtypes import DTYPES
from megatrain.progress import progress_bar
from megatrain.version import __version__

REPORT_FILE = "conversion.json"
WORKING_BYTES = 1 << 30
"""Memory besides the largest tensor in fp32: libraries, blocks of files, activations."""

TargetFormat = Literal["hf", "checkpoint"]
Log = Callable[[str], None]

_TO_CHECKPOINT = ("Hugging Face folder", "DeepSpeed universal checkpoint")
"""Kinds of sources that become checkpoints unless the user chooses a format."""


@dataclass(frozen=True)
class ConversionResult:
    """A finished conversion.

    Attributes:
        target: the written folder.
        to: its format.
        verification: the comparison with the source; None if it was skipped.
        sha256: the SHA-256 of each tensor of the model; None if the verification was skipped.
    """

    target: Path
    to: TargetFormat
    verification: VerificationResult | None
    sha256: dict[str, str] | None


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: TargetFormat | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    verify: bool = True,
    config: str | None = None,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    log: Log | None = None,
) -> ConversionResult:
    """Converts a model into a Hugging Face folder or a checkpoint that a run resumes from.

    The target appears complete and verified, or not at all.

    Args:
        source: a checkpoint or run of megatrain, a Hugging Face folder, a checkpoint of Megatron-LM
            (one file a rank, or torch_dist), or a universal checkpoint of DeepSpeed.
        target: a new or empty folder.
        to: "hf" or "checkpoint"; by default "checkpoint" for Hugging Face and universal sources.
        dtype: the dtype of the weights; by default each tensor keeps its own.
        max_shard_bytes: the largest size of a file.
        verify: compare bytes and logits of source and target before the target appears.
        config: a Hugging Face folder or config.json of the model, for a source without one.
        tokenizer: the folder of the target's tokenizer; by default the source's.
        vocab_size: rows of the embedding without padding, for a Megatron-LM checkpoint.
        log: called with each line of output; by default the function is silent.

    Returns:
        The folder and the result of the verification.

    Raises:
        CheckpointError: the source is damaged, incomplete or not supported, the target is not
            empty, the disk is too small, or the verification failed.
        ConfigError: the model is of a family that is not supported.
    """
    source, target = Path(source), Path(target)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    log = log or _discard
    check_target(target)
    opened = open_source(source, Hints(config, tokenizer, vocab_size))
    architecture = _bind(opened)
    log(f"{opened.folder}: {opened.kind} ({architecture.model_type})")
    if opened.note:
        log(f"  note      {opened.note}")
    conversion = _Conversion(
        source=opened,
        architecture=architecture,
        to=to or ("checkpoint" if opened.kind in _TO_CHECKPOINT else "hf"),
        dtype=None if dtype is None else DTYPES[dtype],
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
        log=log,
    )
    conversion.log_plan()
    conversion.check_disk(target)
    with hidden_folder(target) as folder:
        result = conversion.run(folder, target, verify=verify)
        publish(folder, target)
    log(f"wrote {target}")
    return result


def _discard(line: str) -> None:
    pass


def _bind(source: Source) -> TransformerConfig:
    """Finds the tensors of the source's model; raises CheckpointError if one is missing."""
    architecture = any_architecture(source.config)
    if architecture.classifier is not None:
        raise CheckpointError(
            f"{source.folder} is a classifier, but only language models are converted; "
            "transformers loads the folder as it is"
        )
    expected = parameter_shapes(architecture)
    source.bind(architecture, expected)
    check_coverage(source, architecture, expected)
    return architecture


def check_target(target: Path) -> None:
    """Raises CheckpointError unless the target is missing or an empty folder."""
    if target.is_dir() and not target.is_symlink():
        if any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty; give a new folder")
    elif target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists and is not a folder; give a new folder")


@contextlib.contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder next to the target and deletes it at the end, unless it was renamed.

    Raises:
        CheckpointError: another conversion writes the target, or the disk cannot be written.
    """
    folder = target.parent / f".converting-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be created: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{target} is being written by another conversion; "
                "wait for it or give another folder"
            ) from None
        try:
            _clear(folder)  # of a conversion that was killed
            yield folder
        except OSError as error:
            raise CheckpointError(
                f"{target} cannot be written: {error.strerror or error}; nothing was published"
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def publish(folder: Path, target: Path) -> None:
    """Flushes the folder to disk and renames it to the target."""
    for path in folder.rglob("*"):
        flush_to_disk(path)
    flush_to_disk(folder)
    folder.rename(target)
    flush_to_disk(target.parent)


class _Conversion:
    """The conversion of a bound source."""

    def __init__(
        self,
        *,
        source: Source,
        architecture: TransformerConfig,
        to: TargetFormat,
        dtype: torch.dtype | None,
        max_shard_bytes: int,
        tokenizer: Path | None,
        log: Log,
    ) -> None:
        self.source, self.architecture = source, architecture
        self.to, self.dtype, self.tokenizer, self.log = to, dtype, tokenizer, log
        self.tensors = CastTensors(source, dtype)
        self.names = list(parameter_shapes(architecture))
        self.shards = plan_shards(self.names, self.tensors, max_shard_bytes)
        self.optimizer = OptimizerFiles(source, architecture) if to == "checkpoint" else None
        self.num_bytes = sum(nbytes(self.tensors, name) for name in self.names)
        if self.optimizer is not None:
            self.num_bytes += self.optimizer.num_bytes

    def check_disk(self, target: Path) -> None:
        """Raises CheckpointError if the disk of the target is too small."""
        parents = [target, *target.resolve().parents]
        free = shutil.disk_usage(next(path for path in parents if path.exists())).free
        if free < self.num_bytes * 1.01 + 2**20:
            raise CheckpointError(
                f"{target} requires {self.num_bytes / 1e9:.3f} GB, but its disk has "
                f"{free / 1e9:.3f} GB free; nothing was written"
            )

    def log_plan(self) -> None:
        """Prints the sizes of the target and the memory that the conversion will take."""
        elements = {
            name: nbytes(self.source, name) // self.source.dtype(name).itemsize
            for name in self.names
        }
        largest = max(self.names, key=lambda name: nbytes(self.source, name))
        files = "1 file" if len(self.shards) == 1 else f"{len(self.shards)} files"
        target = "Hugging Face folder"
        if self.optimizer is not None:
            target = (
                f"checkpoint with {', '.join(self.optimizer.states)} of the optimizer "
                f"after {self.optimizer.updates:,} updates"
            )
        self.log(
            f"  target    {target}: {len(self.names)} tensors, {sum(elements.values()):,} "
            f"parameters, {self.num_bytes / 1e9:.2f} GB in {files}"
        )
        self.log(
            f"  memory    at most {(elements[largest] * 4 + WORKING_BYTES) / 2**30:.2f} GiB; the "
            f"largest tensor is {largest} of {nbytes(self.source, largest) / 2**30:.2f} GiB"
        )
        bound = None if self.dtype is None else verification.WEIGHT_BOUND.get(self.dtype)
        if bound is not None and any(self.source.dtype(n).itemsize > 2 for n in self.names):
            self.log(f"  dtype     rounding changes a weight by at most {bound:.2g} of its value")

    def run(self, folder: Path, target: Path, *, verify: bool) -> ConversionResult:
        """Writes and verifies all files of the target in `folder`."""
        sync = BackgroundSync()
        try:
            self._write(folder, sync)
            found, hashes = self._verify(folder) if verify else (None, None)
            self._write_report(folder, found, hashes)
            if self.optimizer is not None:
                self.optimizer.finish(folder, self.source)
        finally:
            sync.wait()
        return ConversionResult(target, self.to, found, hashes)

    def _write(self, folder: Path, sync: BackgroundSync) -> None:
        start = time.monotonic()
        stream = None if self.log is _discard else sys.stderr
        with progress_bar(
            self.num_bytes, unit="B", description="  writing ", stream=stream
        ) as progress:
            write_model(folder, self.shards, self.tensors, on_write=progress.update, sync=sync)
            if self.optimizer is not None:
                self.optimizer.write(folder, on_write=progress.update, sync=sync)
        self._write_metadata(folder)
        rate = self.num_bytes / 1e6 / max(time.monotonic() - start, 1e-9)
        self.log(f"  written   {self.num_bytes / 1e9:.2f} GB at {rate:,.0f} MB/s")

    def _write_metadata(self, folder: Path) -> None:
        """Writes config, generation config and tokenizer."""
        from transformers import GenerationConfig

        config = write_config(folder, self.architecture, dtype=self._dtype_name())
        metadata = self.source.metadata_folder
        generation = None if metadata is None else metadata / "generation_config.json"
        if generation is not None and generation.is_file():
            shutil.copyfile(generation, folder / generation.name)
        else:
            GenerationConfig.from_model_config(config).save_pretrained(folder)
        tokenizer = self.tokenizer or metadata
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)

    def _verify(self, folder: Path) -> tuple[VerificationResult, dict[str, str]]:
        written = HFFolder(folder)
        if set(written.names()) != set(self.names):
            raise CheckpointError(
                f"{folder} has other tensors than were written; check the disk of this machine"
            )
        hashes = verification.compare_bytes(written, self.tensors, self.names, folder)
        if self.optimizer is not None:
            self.optimizer.verify(folder)
        found = verification.compare_logits(
            self.source,
            written,
            load_hf_config(str(folder)),
            self.architecture,
            dtype=self.dtype,
            to=self.to,
        )
        self.log(
            f"  verified  {found.tensors} tensors have the same bytes; logits of "
            f"{found.source_computed_by} and {found.target_computed_by} differ by at most "
            f"{found.max_logit_difference:.3g} (allowed {found.bound:.3g})"
        )
        if found.rounding_difference is not None:
            self.log(
                f"            rounding changed logits by at most {found.rounding_difference:.3g}; "
                f"the largest logit is {found.largest_logit:.3g}"
            )
        return found, hashes

    def _write_report(
        self, folder: Path, found: VerificationResult | None, hashes: dict[str, str] | None
    ) -> None:
        import safetensors
        import transformers

        report: dict[str, Any] = {
            "source": str(self.source.folder),
            "source_kind": self.source.kind,
            "to": self.to,
            "model_type": self.architecture.model_type,
            "dtype": self._dtype_name(),
            "proof": None if found is None else found._asdict(),
            "sha256_of_tensors": None if hashes is None else dict(sorted(hashes.items())),
            "versions": {
                "megatrain": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
            },
        }
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")

    def _dtype_name(self) -> str:
        """Returns the dtype of most bytes, as config.json names it."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.names:
            dtype = self.tensors.dtype(name)
            sizes[dtype] = sizes.get(dtype, 0) + nbytes(self.tensors, name)
        return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
