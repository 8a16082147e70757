"""Log-probabilities of the model that preference tuning began from, kept by what a sequence holds.

They are computed once, before the first step, and written to the run's folder; a run that goes on reads them, since its own weights
are no longer those. The key of a sequence is a hash of its tokens and labels, so that neither order nor layout matters.
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

FILE_NAME = "reference.safetensors"

logger = logging.getLogger("megatrain")
BatchesOf = Callable[[int], Sequence[Batch]]


class ReferenceLogProbs:
    """The table of a run.

    `source` says which weights the table is of.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self.path, self.source = folder / FILE_NAME, source
        self.table: dict[int, float] = {}

    def attach(self, microbatches: Sequence[Microbatch]) -> None:
        """Give each microbatch its sequences' log-probabilities; those without a token that is compared have none."""
        for microbatch in microbatches:
            values = [
                self.table[key] if used else 0.0
                for key, used in _rows(microbatch.tokens, microbatch.labels)
            ]
            microbatch.reference = torch.tensor(values, device=microbatch.tokens.device)

    def read(self, *, resumed: bool) -> None:
        """Take what the run's folder holds; of other weights than these it holds nothing, unless the run goes on from there."""
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
                f"{self.path} cannot be read: {error}; delete it and start afresh"
            ) from None

    def lacks(self, parts: Sequence[tuple[BatchesOf, int]], *, world: MeshAxis) -> bool:
        """Whether any rank misses a sequence that it will need."""
        mine = any(
            used and key not in self.table
            for batch in _all(parts)
            for key, used in _rows(batch.tokens, batch.labels)
        )
        asked = torch.tensor(int(mine))
        if dist.get_backend() == "nccl":
            asked = asked.cuda()
        return bool(collectives.all_reduce(asked, world, op=dist.ReduceOp.MAX))

    def compute(self, runner: StepRunner, parts: Sequence[tuple[BatchesOf, int]]) -> None:
        """Fill the table by forwards with the weights as they are, without adapters; all ranks call it together."""
        mine: dict[int, float] = {}
        total = sum(count for _, count in parts)
        done = 0
        for batches_of, count in parts:
            for number in range(count):
                microbatches = runner.log_probs(batches_of(number))
                for microbatch in microbatches if runner.mesh.tensor.rank == 0 else []:
                    if microbatch.log_probs is not None:  # the last stage
                        keys = [key for key, _ in _rows(microbatch.tokens, microbatch.labels)]
                        mine |= dict(zip(keys, microbatch.log_probs.tolist(), strict=True))
                done += 1
                if runner.mesh.rank == 0 and done * 10 // total != (done - 1) * 10 // total:
                    logger.info(f"  reference log-probabilities: {done} of {total} batches")
        self.table = {
            key: value
            for part in collectives.gather_objects(mine, runner.mesh.world)
            for key, value in part.items()
        }
        if runner.mesh.rank == 0:
            self._write()

    def _write(self) -> None:
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
    """The table for these batches: read, or computed where the weights are still those that it is of."""
    reference = ReferenceLogProbs(Path(config.run.output_dir), _source(config))
    reference.read(resumed=resumed)
    if reference.lacks(parts, world=runner.mesh.world):
        if resumed and not config.lora.rank:
            raise CheckpointError(
                f"{reference.path} lacks log-probabilities of these data, and only the weights that the run began from can make "
                "them; give the data and the file that it began with, or start another run"
            )
        reference.compute(runner, parts)
    return reference


def _source(config: Config) -> str:
    """Which weights the run begins from: their files' names, sizes and times, or the model's config and the seed."""
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
    """Each sequence's key, and whether it has a token that is compared."""
    for row, told in zip(tokens.cpu().numpy(), labels.cpu().numpy(), strict=True):
        digest = hashlib.blake2b(row.tobytes() + told.tobytes(), digest_size=8).digest()
        yield int.from_bytes(digest, "little") >> 1, bool((told >= 0).any())
