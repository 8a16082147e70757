"""Log-likelihoods of rows of tokens under a model that is spread over ranks, without optimizer or gradients.

All ranks are given the same rows in the same order and get the same scores. Rows are put together by length, so that little is
computed of padding: it stands behind what counts, where causal attention never looks.

    rows, sorted by length      | microbatches of one round, all of one length
    data rank 0                 | 0 2 4 ...
    data rank 1                 | 1 3 5 ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis, ProcessMesh
from megatrain.distributed.tensor_parallel import vocab_parallel_cross_entropy
from megatrain.evaluation.windows import IGNORED, Row
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.config import TransformerConfig
from megatrain.models.microbatch import Microbatch
from megatrain.models.microbatches import MicrobatchFactory
from megatrain.models.transformer import Head, HiddenStates
from megatrain.ops.dtypes import DTYPES
from megatrain.pipeline.communication import add_communication
from megatrain.pipeline.executor import Executor, Stage
from megatrain.pipeline.p2p import P2PCommunicator
from megatrain.pipeline.schedule import Instruction
from megatrain.pipeline.schedules import build_schedule, forward_only

ROUNDS_SORTED = 16
"""Rounds of rows that are read ahead, to be put together by length."""

Item = TypeVar("Item")


class Score(NamedTuple):
    """Of the labels that count in a row: the sum of their log-likelihoods, and whether each was the likeliest token."""

    loglikelihood: float
    greedy: bool


class Scorer:
    """A rank's stage in evaluation. All ranks call its methods together."""

    def __init__(
        self,
        stage: Stage,
        config: Config,
        architecture: TransformerConfig,
        mesh: ProcessMesh,
        device: torch.device,
    ) -> None:
        self.config, self.mesh, self.device, self.stage = config, mesh, device, stage.eval()
        self.hidden_size, self.classifier = architecture.hidden_size, architecture.classifier
        self.microbatch_factory = MicrobatchFactory(config, architecture, mesh, device)
        self.microbatches = 4 * mesh.pipeline.size if mesh.pipeline.size > 1 else 1
        self.executor = Executor(
            self._forward,
            communicator=P2PCommunicator(mesh.pipeline, ring=False)
            if mesh.pipeline.size > 1
            else None,
            hidden_shape=(0, 0, 0),
            dtype=DTYPES[config.train.dtype],
            device=device,
            activity=mesh.activity,
        )
        self._instructions = lru_cache(self._make_instructions)

    @property
    def rows_per_round(self) -> int:
        """Rows that all ranks together take at once."""
        return self.microbatches * self.config.train.micro_batch_size * self.mesh.data.size

    def scores(self, rows: Iterable[Row]) -> Iterator[Score]:
        """Of a language model: one score a row, in the rows' order."""
        return (Score(-loss, misses == 0) for loss, misses in self.told(rows))

    def told(self, rows: Iterable[Row]) -> Iterator[list[float]]:
        """What the head says of each row, in the rows' order: `_row_scores` or `_class_scores`."""
        waiting = iter(rows)
        while block := list(islice(waiting, ROUNDS_SORTED * self.rows_per_round)):
            order = sorted(range(len(block)), key=lambda index: -len(block[index].tokens))
            found: dict[int, list[float]] = {}
            for indices in _parts(order, self.rows_per_round):
                found.update(
                    zip(indices, self._round([block[index] for index in indices]), strict=True)
                )
            yield from (found[index] for index in range(len(block)))

    def _round(self, rows: list[Row]) -> list[list[float]]:
        """Of at most `rows_per_round` rows."""
        size, replicas = self.config.train.micro_batch_size, self.mesh.data.size
        asked = len(rows)
        count = -(-asked // (size * replicas))
        length = self._padded(max(len(row.tokens) for row in rows))
        rows = [*rows, *[Row([], [])] * (count * size * replicas - len(rows))]
        mine = list(_parts(rows, size))[self.mesh.data.rank :: replicas]
        microbatches = [
            self.microbatch_factory.make(_batch(some, length), step=None, index=index)
            for index, some in enumerate(mine)
        ]
        self.executor.hidden_shape = (
            length // (self.mesh.tensor.size if self.config.parallel.sequence else 1),
            size,
            self.hidden_size,
        )
        results = self.executor.run(self._instructions(count), microbatches, backward=None)
        return self._gathered(results, count, self._width(length))[:asked]

    def _padded(self, length: int) -> int:
        unit = self.mesh.tensor.size if self.config.parallel.sequence else 1
        return -(-length // unit) * unit

    def _width(self, length: int) -> int:
        """Numbers that the head says of a row."""
        if self.classifier is None:
            return 2
        return length if self.classifier.of_tokens else self.classifier.num_labels

    def _gathered(self, results: list[Tensor], count: int, width: int) -> list[list[float]]:
        """What the last stage of each replica found, on all ranks and in the rows' order."""
        table = torch.zeros(
            (count, self.mesh.data.size, self.config.train.micro_batch_size, width),
            dtype=torch.float64,
            device=self.device,
        )
        if results and self.mesh.tensor.rank == 0:
            table[:, self.mesh.data.rank] = torch.stack(results)
        collectives.all_reduce(table, self.mesh.world)
        return table.view(-1, width).tolist()

    def _make_instructions(self, count: int) -> list[Instruction]:
        return add_communication(
            forward_only(build_schedule("1f1b", self.mesh.pipeline.size, count))
        )[self.mesh.pipeline.rank]

    def _forward(
        self, hidden_states: HiddenStates | None, microbatch: Microbatch, chunk: int
    ) -> HiddenStates | Tensor:
        *layers, last = self.stage.layers
        for layer in layers:
            hidden_states = layer(hidden_states, microbatch)
        if isinstance(last, Head):
            return _row_scores(last, hidden_states, microbatch)
        return (
            _class_scores(last, hidden_states, microbatch)
            if isinstance(last, ClassificationHead)
            else last(hidden_states, microbatch)
        )


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _batch(rows: Sequence[Row], length: int) -> Batch:
    tokens = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens, dtype=torch.int64)
        labels[index, : len(row.labels)] = torch.tensor(row.labels, dtype=torch.int64)
    return Batch(
        tokens, labels, torch.arange(length).expand(len(rows), length), torch.zeros_like(tokens)
    )


def _row_scores(head: Head, hidden_states: HiddenStates | None, microbatch: Microbatch) -> Tensor:
    """Of each row the summed loss, and how many labels were not the likeliest token: float64 [B, 2]."""
    assert hidden_states is not None
    logits = head.logits(hidden_states).flatten(0, 1)
    labels = microbatch.labels.t().reshape(-1)
    misses = _misses(logits, labels, start=head.start, vocab_size=head.vocab_size, axis=head.axis)
    losses = vocab_parallel_cross_entropy(
        logits, labels, start=head.start, vocab_size=head.vocab_size, axis=head.axis
    )
    rows = microbatch.labels.shape[0]
    return torch.stack(
        [losses.double().view(-1, rows).sum(0), misses.double().view(-1, rows).sum(0)], dim=1
    )


def _class_scores(
    head: ClassificationHead, hidden_states: HiddenStates | None, microbatch: Microbatch
) -> Tensor:
    """Of each row the scores of all classes, or the class told of each labelled token and -1 elsewhere: float64 [B, classes or S]."""
    scores, _ = head.scores(hidden_states, microbatch)
    labelled = microbatch.labels >= 0
    if head.classifier.of_tokens:
        told = torch.full(labelled.shape, -1.0, dtype=torch.float64, device=scores.device)
        told[labelled] = scores.argmax(1).double()
        return told
    told = torch.zeros(
        (labelled.shape[0], head.classifier.num_labels), dtype=torch.float64, device=scores.device
    )
    told[labelled.any(1)] = scores.double()
    return told


def _misses(
    logits: Tensor, labels: Tensor, *, start: int, vocab_size: int, axis: MeshAxis
) -> Tensor:
    """Which labels are below another token's logit, bool [n], from this rank's logits [n, V/t]."""
    real = max(0, min(logits.shape[1], vocab_size - start))
    lowest = torch.finfo(torch.float32).min
    top = (
        logits[:, :real].amax(1).float()
        if real
        else logits.new_full((logits.shape[0],), lowest, dtype=torch.float32)
    )
    local = labels - start
    here = (local >= 0) & (local < real)
    own = (
        logits.gather(1, local.masked_fill(~here, 0)[:, None])
        .squeeze(1)
        .float()
        .masked_fill(~here, lowest)
    )
    both = collectives.all_reduce(torch.stack([top, own]), axis, op=dist.ReduceOp.MAX)
    return (both[0] > both[1]) & (labels >= 0)
