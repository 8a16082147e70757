"""Reference log-probabilities of preference tuning: those of the initial model, by sequence.

They are computed once, before the first step, and written to the folder of the run. A resumed run
reads them, because its weights have changed since. The key of a sequence is a hash of its tokens
and labels, so neither order nor layout matters.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis
from megatrain.errors import CheckpointError
from megatrain.models.microbatch import Microbatch

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepRunner

FILE_NAME = "ref_logprobs.safetensors"
OLD_FILE_NAME = "reference.safetensors"
"""Name in the folders of runs that began before the file was renamed."""

logger = logging.getLogger("megatrain")
BatchesOf = Callable[[int], Sequence[Batch]]


class ReferenceLogProbs:
    """The log-probabilities of a run's sequences.

    Attributes:
        path: the file.
        source: identifies the weights that they were computed with.
        table: the log-probability of each sequence, by its key.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self.path, self.source = folder / FILE_NAME, source
        if not self.path.exists() and (folder / OLD_FILE_NAME).exists():
            self.path = folder / OLD_FILE_NAME
        self.table: dict[int, float] = {}

    def attach(self, microbatches: Sequence[Microbatch]) -> None:
        """Sets the log-probabilities of each microbatch; 0 for sequences without a loss."""
        for microbatch in microbatches:
            values = [
                self.table[key] if used else 0.0
                for key, used in _rows(microbatch.tokens, microbatch.labels)
            ]
            microbatch.reference = torch.tensor(values, device=microbatch.tokens.device)

    def read(self, *, resumed: bool) -> None:
        """Reads the file, if it exists and was computed with these weights.

        Args:
            resumed: the run resumes, so the file is of its initial weights.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                if resumed or file.metadata()["source"] == self.source:
                    self.table = dict(
                        zip(
                            file.get_tensor("keys").tolist(),
                            file.get_tensor("log_probs").tolist(),
                            strict=True,
                        )
                    )
        except FileNotFoundError:
            return
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path} is damaged ({error}); delete it and start from scratch",
                command=f"rm {self.path}",
            ) from None

    def is_incomplete(self, parts: Sequence[tuple[BatchesOf, int]], *, world: MeshAxis) -> bool:
        """Returns True if a rank lacks a sequence of these batches; all ranks call it."""
        is_missing = any(
            used and key not in self.table
            for batch in _all(parts)
            for key, used in _rows(batch.tokens, batch.labels)
        )
        flag = torch.tensor(int(is_missing))
        if dist.get_backend() == "nccl":
            flag = flag.cuda()
        return bool(collectives.all_reduce(flag, world, op=dist.ReduceOp.MAX))

    def compute(self, runner: StepRunner, parts: Sequence[tuple[BatchesOf, int]]) -> None:
        """Computes the table with the current weights, without adapters; all ranks call it."""
        local: dict[int, float] = {}
        total = sum(count for _, count in parts)
        done = 0
        for batches_of, count in parts:
            for number in range(count):
                microbatches = runner.log_probs(batches_of(number))
                for microbatch in microbatches if runner.mesh.tensor.rank == 0 else []:
                    if microbatch.log_probs is not None:  # the last stage
                        keys = [key for key, _ in _rows(microbatch.tokens, microbatch.labels)]
                        local |= dict(zip(keys, microbatch.log_probs.tolist(), strict=True))
                done += 1
                if runner.mesh.rank == 0 and done * 10 // total != (done - 1) * 10 // total:
                    logger.info(f"  reference log-probabilities: {done} of {total} batches")
        self.table = {
            key: value
            for part in collectives.gather_objects(local, runner.mesh.world)
            for key, value in part.items()
        }
        if runner.mesh.rank == 0:
            self._write()

    def _write(self) -> None:
        self.path = self.path.with_name(FILE_NAME)
        partial = self.path.with_suffix(".partial")
        tensors = {
            "keys": torch.tensor(list(self.table), dtype=torch.int64),
            "log_probs": torch.tensor(list(self.table.values()), dtype=torch.float32),
        }
        save_file(tensors, partial, metadata={"source": self.source})
        partial.replace(self.path)


def make_ref_logprobs(
    config: Config, runner: StepRunner, parts: Sequence[tuple[BatchesOf, int]], *, resumed: bool
) -> ReferenceLogProbs:
    """Returns the table for these batches, from the file or computed with the initial weights.

    Raises:
        CheckpointError: the file of a resumed run is damaged or lacks sequences.
    """
    reference = ReferenceLogProbs(Path(config.run.output_dir), _source(config))
    reference.read(resumed=resumed)
    if reference.is_incomplete(parts, world=runner.mesh.world):
        if resumed and not config.lora.rank:
            raise CheckpointError(
                f"{reference.path} lacks log-probabilities of these data, which only the initial "
                "weights of the run give; restore its data and this file, or start another run",
                fix={"run.output_dir": f"{config.run.output_dir}-new"},
            )
        reference.compute(runner, parts)
    return reference


def _source(config: Config) -> str:
    """Returns a hash of the initial weights.

    It covers names, sizes and times of the files, or the config of the model and the seed.
    """
    digest = hashlib.blake2b(
        repr(
            (config.train.dtype, config.train.init_from or (config.model, config.run.seed))
        ).encode(),
        digest_size=16,
    )
    if config.train.init_from is not None:
        for path in sorted(Path(config.train.init_from).iterdir()):
            if path.suffix in (".safetensors", ".bin"):
                digest.update(
                    repr((path.name, path.stat().st_size, path.stat().st_mtime_ns)).encode()
                )
    return digest.hexdigest()


def _all(parts: Sequence[tuple[BatchesOf, int]]) -> Iterator[Batch]:
    for batches_of, count in parts:
        for number in range(count):
            yield from batches_of(number)


def _rows(tokens: Tensor, labels: Tensor) -> Iterator[tuple[int, bool]]:
    """Yields the key of each sequence, and True if it has a token with a loss."""
    for row, row_labels in zip(tokens.cpu().numpy(), labels.cpu().numpy(), strict=True):
        digest = hashlib.blake2b(row.tobytes() + row_labels.tobytes(), digest_size=8).digest()
        yield int.from_bytes(digest, "little") >> 1, bool((row_labels >= 0).any())
