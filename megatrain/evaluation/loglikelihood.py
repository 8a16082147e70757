"""Log-likelihoods of rows of tokens under a model that is spread over ranks, without gradients.

All ranks pass the same rows in the same order and get the same scores. Rows of similar length are
computed together, so that there is little padding. It follows the tokens, where causal attention
does not see it.

    rows, sorted by length      | microbatches of one round, all of one length
    data rank 0                 | 0 2 4 ...
    data rank 1                 | 1 3 5 ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.distributed import collectives
from megatrain.distributed.cross_entropy import vocab_parallel_cross_entropy
from megatrain.distributed.mesh import MeshAxis, ProcessMesh
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.config import TransformerConfig
from megatrain.models.microbatch import Microbatch, MicrobatchFactory
from megatrain.models.transformer import Head, HiddenStates
from megatrain.ops.dtypes import DTYPES
from megatrain.pipeline.communication import add_communication
from megatrain.pipeline.executor import Executor, Stage
from megatrain.pipeline.p2p import P2PCommunicator
from megatrain.pipeline.schedule import Instruction
from megatrain.pipeline.schedules import build_schedule, forward_only

IGNORED = -100
"""Label of a token that is not scored."""

SORTED_ROUNDS = 16
"""Rounds of rows that are read ahead and sorted by length."""

Item = TypeVar("Item")


class ProgressBar(Protocol):
    """The part of tqdm that a scorer uses."""

    def update(self, n: float) -> Any: ...


class Row(NamedTuple):
    """Tokens for one forward pass, and as many labels, IGNORED where no prediction is scored."""

    tokens: list[int]
    labels: list[int]


def make_row(tokens: Sequence[int], *, scored: int) -> Row:
    """Returns a row that predicts the last `scored` tokens from those before them."""
    unscored = len(tokens) - 1 - scored
    assert unscored >= 0, (len(tokens), scored)
    return Row(list(tokens[:-1]), [IGNORED] * unscored + list(tokens[1 + unscored :]))


class Score(NamedTuple):
    """The summed log-likelihood of a row's labels, and whether each is the most likely token."""

    loglikelihood: float
    greedy: bool


class Scorer:
    """The stage of this rank in an evaluation. All ranks call its methods together.

    Attributes:
        num_tokens: tokens of all rows so far, without padding.
    """

    def __init__(
        self,
        stage: Stage,
        config: Config,
        architecture: TransformerConfig,
        mesh: ProcessMesh,
        device: torch.device,
        *,
        progress: ProgressBar | None = None,
    ) -> None:
        self.num_tokens, self.progress = 0, progress
        self.stage, self.mesh, self.device = stage.eval(), mesh, device
        self.micro_batch_size = config.train.micro_batch_size
        self.length_multiple = mesh.tensor.size if config.parallel.sequence else 1
        self.hidden_size, self.classifier = architecture.hidden_size, architecture.classifier
        self.microbatch_factory = MicrobatchFactory(
            architecture,
            mesh,
            device,
            dtype=DTYPES[config.train.dtype],
            separate_documents=config.data.document_mask or config.data.packing,
            seed=config.run.seed,
        )
        is_pipelined = mesh.pipeline.size > 1
        self.microbatches_per_round = 4 * mesh.pipeline.size if is_pipelined else 1
        self.executor = Executor(
            self._forward,
            communicator=P2PCommunicator(mesh.pipeline, ring=False) if is_pipelined else None,
            hidden_shape=(0, 0, 0),
            dtype=DTYPES[config.train.dtype],
            device=device,
            activity=mesh.activity,
        )
        self._instructions = lru_cache(self._make_instructions)

    @property
    def rows_per_round(self) -> int:
        """Rows that all ranks together compute at once."""
        return self.microbatches_per_round * self.micro_batch_size * self.mesh.data.size

    def scores(self, rows: Iterable[Row]) -> Iterator[Score]:
        """Yields the score of each row under a language model, in order."""
        return (Score(-loss, misses == 0) for loss, misses in self.outputs(rows))

    def outputs(self, rows: Iterable[Row]) -> Iterator[list[float]]:
        """Yields what the head computes for each row, in order.

        For a language model it is the loss and the number of labels that are not the most likely
        token; for a classifier the score of each class; for a token classifier each token's class.
        """
        rows = iter(rows)
        while block := list(islice(rows, SORTED_ROUNDS * self.rows_per_round)):
            by_length = sorted(range(len(block)), key=lambda index: -len(block[index].tokens))
            outputs: dict[int, list[float]] = {}
            for indices in _split(by_length, self.rows_per_round):
                round_rows = [block[index] for index in indices]
                outputs.update(zip(indices, self._run_round(round_rows), strict=True))
                self._count(round_rows)
            yield from (outputs[index] for index in range(len(block)))

    def _run_round(self, rows: list[Row]) -> list[list[float]]:
        """Returns the outputs of at most `rows_per_round` rows."""
        size, replicas = self.micro_batch_size, self.mesh.data.size
        num_rows = len(rows)
        count = -(-num_rows // (size * replicas))
        longest = max(len(row.tokens) for row in rows)
        length = -(-longest // self.length_multiple) * self.length_multiple
        rows = [*rows, *[Row([], [])] * (count * size * replicas - num_rows)]
        local = list(_split(rows, size))[self.mesh.data.rank :: replicas]
        microbatches = [
            self.microbatch_factory.make(_make_batch(group, length), step=None, index=index)
            for index, group in enumerate(local)
        ]
        self.executor.hidden_shape = (length // self.length_multiple, size, self.hidden_size)
        outputs = self.executor.run(self._instructions(count), microbatches, backward=None)
        return self._gather(outputs, count, self._output_width(length))[:num_rows]

    def _count(self, rows: list[Row]) -> None:
        count = sum(len(row.tokens) for row in rows)
        self.num_tokens += count
        if self.progress is not None:
            self.progress.update(count)

    def _output_width(self, length: int) -> int:
        """Returns the number of outputs of a row."""
        if self.classifier is None:
            return 2
        return length if self.classifier.of_tokens else self.classifier.num_labels

    def _gather(self, outputs: list[Tensor], count: int, width: int) -> list[list[float]]:
        """Returns the outputs of the last stages of all replicas on all ranks, in order of rows."""
        table = torch.zeros(
            (count, self.mesh.data.size, self.micro_batch_size, width),
            dtype=torch.float64,
            device=self.device,
        )
        if outputs and self.mesh.tensor.rank == 0:
            table[:, self.mesh.data.rank] = torch.stack(outputs)
        collectives.all_reduce(table, self.mesh.world)
        return table.view(-1, width).tolist()

    def _make_instructions(self, count: int) -> list[Instruction]:
        schedule = forward_only(build_schedule("1f1b", self.mesh.pipeline.size, count))
        return add_communication(schedule)[self.mesh.pipeline.rank]

    def _forward(
        self, hidden_states: HiddenStates | None, microbatch: Microbatch, chunk: int
    ) -> HiddenStates | Tensor:
        *layers, last = self.stage.layers
        for layer in layers:
            hidden_states = layer(hidden_states, microbatch)
        if isinstance(last, Head):
            return _row_losses(last, hidden_states, microbatch)
        if isinstance(last, ClassificationHead):
            return _class_outputs(last, hidden_states, microbatch)
        return last(hidden_states, microbatch)


def _split(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _make_batch(rows: Sequence[Row], length: int) -> Batch:
    tokens = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens, dtype=torch.int64)
        labels[index, : len(row.labels)] = torch.tensor(row.labels, dtype=torch.int64)
    positions = torch.arange(length).expand(len(rows), length)
    return Batch(tokens, labels, positions, torch.zeros_like(tokens))


def _row_losses(head: Head, hidden_states: HiddenStates | None, microbatch: Microbatch) -> Tensor:
    """Returns float64 [B, 2]: each row's loss and its number of labels other than the top token."""
    assert hidden_states is not None
    logits = head.logits(hidden_states).flatten(0, 1)
    labels = microbatch.labels.t().reshape(-1)
    start, vocab_size, axis = head.start, head.vocab_size, head.axis
    misses = _find_misses(logits, labels, start=start, vocab_size=vocab_size, axis=axis)
    losses = vocab_parallel_cross_entropy(
        logits, labels, start=start, vocab_size=vocab_size, axis=axis
    )
    num_rows = microbatch.labels.shape[0]
    columns = [values.double().view(-1, num_rows).sum(0) for values in (losses, misses)]
    return torch.stack(columns, dim=1)


def _class_outputs(
    head: ClassificationHead, hidden_states: HiddenStates | None, microbatch: Microbatch
) -> Tensor:
    """Returns float64 [B, classes] scores; for tokens [B, S] classes, -1 without a label."""
    scores = head.scores(hidden_states, microbatch)
    labelled = microbatch.labels >= 0
    if head.config.of_tokens:
        classes = torch.full(labelled.shape, -1.0, dtype=torch.float64, device=scores.device)
        classes[labelled] = scores.argmax(1).double()
        return classes
    shape = (labelled.shape[0], head.config.num_labels)
    outputs = torch.zeros(shape, dtype=torch.float64, device=scores.device)
    outputs[labelled.any(1)] = scores.double()
    return outputs


def _find_misses(
    logits: Tensor, labels: Tensor, *, start: int, vocab_size: int, axis: MeshAxis
) -> Tensor:
    """Returns bool [n]: whether another token has a larger logit than the label, from [n, V/t]."""
    num_tokens = max(0, min(logits.shape[1], vocab_size - start))
    lowest = torch.finfo(torch.float32).min
    if num_tokens:
        largest = logits[:, :num_tokens].amax(1).float()
    else:
        largest = logits.new_full((logits.shape[0],), lowest, dtype=torch.float32)
    local = labels - start
    is_local = (local >= 0) & (local < num_tokens)
    label_logits = logits.gather(1, local.masked_fill(~is_local, 0)[:, None]).squeeze(1).float()
    label_logits = label_logits.masked_fill(~is_local, lowest)
    both = collectives.all_reduce(torch.stack([largest, label_logits]), axis, op=dist.ReduceOp.MAX)
    return (both[0] > both[1]) & (labels >= 0)
