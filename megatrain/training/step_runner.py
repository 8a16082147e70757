"""A training step and an evaluation on one rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatrain.checkpoint.init_from_hf import Pretrained
from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.distributed import collectives
from megatrain.distributed.mesh import ProcessMesh
from megatrain.models.config import TransformerConfig
from megatrain.models.init import initialize, initialize_parameter
from megatrain.models.lora import add_adapters, set_magnitudes
from megatrain.models.losses import make_objective
from megatrain.models.microbatch import Microbatch, MicrobatchFactory
from megatrain.models.quantize import quantize_linears
from megatrain.models.transformer import Head
from megatrain.ops.dtypes import DTYPES
from megatrain.optim.lr_schedule import learning_rate
from megatrain.optim.zero import StepResult, ZeroOptimizer
from megatrain.pipeline.communication import add_communication
from megatrain.pipeline.executor import Executor, Stage
from megatrain.pipeline.p2p import P2PCommunicator
from megatrain.pipeline.schedule import Schedule
from megatrain.pipeline.schedules import forward_only
from megatrain.pipeline.stage_builder import build_stage, run_schedule
from megatrain.pipeline.verify import check_schedule
from megatrain.training import nonfinite
from megatrain.training.nonfinite import NonFiniteStep
from megatrain.training.ref_logprobs import ReferenceLogProbs


class StepReport(NamedTuple):
    """The outcome of a step, the same on all ranks.

    Attributes:
        loss: mean over the tokens, or preference pairs, of the global batch.
        grad_norm: norm of the whole gradient before clipping; NaN in a non-finite step.
        applied: False if the update was skipped.
        measures: further means of the objective, by name.
        reason: why the update was skipped.
        rescaled: True if the gradients were too large for fp16 at this loss scale, which is lower
            afterwards. This is how the scale is found and does not count as a non-finite step.
    """

    loss: float
    grad_norm: float
    lr: float
    applied: bool
    measures: dict[str, float]
    reason: str = ""
    rescaled: bool = False


class Evaluation(NamedTuple):
    """Means over the tokens, or pairs, of an evaluation; the same on all ranks."""

    loss: float
    measures: dict[str, float]


def reference_mode(config: Config) -> Literal["none", "adapters-off", "beforehand"]:
    """Returns how a preference task gets the reference log-probabilities."""
    if config.task != "dpo":
        return "none"
    if config.preference.reference == "auto":
        return "adapters-off" if config.lora.rank else "beforehand"
    return config.preference.reference


class StepRunner:
    """The stages of a rank with their optimizer and schedule. All ranks call its methods together.

    Attributes:
        stage: the layers of this rank.
        optimizer: the optimizer of the stage.
        schedule: the pipeline schedule.
        ref_logprobs: the table of reference log-probabilities, if the task needs one.
    """

    def __init__(
        self,
        config: Config,
        architecture: TransformerConfig,
        mesh: ProcessMesh,
        device: torch.device,
        *,
        pretrained: Pretrained | None = None,
        schedule: Schedule | None = None,
        channels: P2PCommunicator | None = None,
        optimizer: type[ZeroOptimizer] = ZeroOptimizer,
    ) -> None:
        """Builds the stages.

        Args:
            pretrained: the initial weights; None initializes them randomly.
            schedule: replaces the schedule of the config.
            channels: the communicator of the pipeline; None creates one if there are several ranks.
            optimizer: the class of the optimizer.
        """
        self.config, self.architecture, self.mesh, self.device = config, architecture, mesh, device
        self.microbatches = config.microbatches(mesh.data.size)
        self.objective = make_objective(config.task, config.preference)
        self.ref_logprobs: ReferenceLogProbs | None = None
        self.set_schedule(schedule or run_schedule(config, mesh.data.size))
        self.stage = self._build_stage(pretrained)
        self.optimizer = optimizer(
            self.stage,
            settings=config.optimizer,
            parallel=config.parallel,
            dtype=DTYPES[config.train.dtype],
            mesh=mesh,
            microbatches=self.microbatches,
        )
        if pretrained is not None:
            pretrained.load_master_weights(self.optimizer)
        if channels is None and mesh.pipeline.size > 1:
            channels = P2PCommunicator(mesh.pipeline, ring=self.schedule.placement.chunks > 1)
        split = mesh.tensor.size if config.parallel.sequence else 1
        self.executor = Executor(
            self.optimizer.module,
            communicator=channels,
            hidden_shape=(
                config.data.sequence_length // split,
                config.train.micro_batch_size,
                architecture.hidden_size,
            ),
            dtype=DTYPES[config.train.dtype],
            device=device,
            activity=mesh.activity,
        )
        self.microbatch_factory = MicrobatchFactory(
            architecture,
            mesh,
            device,
            dtype=DTYPES[config.train.dtype],
            separate_documents=config.data.document_mask or config.data.packing,
            seed=config.run.seed,
        )

    def _build_stage(self, pretrained: Pretrained | None) -> Stage:
        config, architecture, mesh = self.config, self.architecture, self.mesh
        stage = build_stage(config, architecture, mesh, str(self.device), self.schedule.placement)
        if config.lora.quantize != "none":
            fill = initialize_parameter if pretrained is None else pretrained.load_parameter
            quantize_linears(stage, device=self.device, fill=partial(fill, seed=config.run.seed))
        if config.lora.rank:
            add_adapters(stage, architecture, config.lora, mesh.tensor)
        if pretrained is None:
            initialize(stage, config.run.seed)
        else:
            pretrained.load_weights(stage, config.run.seed)
        set_magnitudes(stage)
        for layer in stage.layers:
            if isinstance(layer, Head):
                layer.objective = self.objective
        return stage

    def set_schedule(self, schedule: Schedule) -> None:
        """Replaces the schedule by another of the same placement.

        Raises:
            ScheduleError: the schedule is invalid.
        """
        check_schedule(schedule, self.microbatches)
        self.schedule = schedule
        rank = self.mesh.pipeline.rank
        self.instructions = add_communication(schedule)[rank]
        self.forward_instructions = add_communication(forward_only(schedule))[rank]

    # -- a step ----------------------------------------------------------------------------------

    def train_step(self, step: int, batches: Sequence[Batch]) -> StepReport:
        """Trains on the microbatches of this data rank; `step` counts from 1."""
        microbatches = self._make_microbatches(batches, step)
        self._set_reference(microbatches)
        self.stage.train()
        count = self._count(batches)
        weight = torch.tensor(
            self.mesh.data.size * self.optimizer.loss_scale / count, device=self.device
        )
        losses = self.executor.run(
            self.instructions, microbatches, backward=self.optimizer.backward, loss_weight=weight
        )
        largest = self.optimizer.max_abs_gradients()
        has_nonfinite, loss, *sums = self._totals(
            losses, microbatches, count, has_nonfinite=self.optimizer.has_nonfinite(largest)
        )
        measures = dict(zip(self.objective.measures, sums, strict=True))
        lr = learning_rate(
            step,
            peak=self.config.optimizer.lr,
            schedule=self.config.lr_schedule,
            steps=self.config.steps,
        )
        if has_nonfinite or not math.isfinite(loss):
            self.optimizer.zero_grad()
            result = StepResult(math.nan, False)
        else:
            result = self.optimizer.step(lr)
        report = StepReport(
            loss, result.grad_norm, lr, result.applied, measures, rescaled=result.rescaled
        )
        if result.applied or result.rescaled:
            return report
        self._nonfinite_step = NonFiniteStep(microbatches, losses, largest)
        return report._replace(reason=nonfinite.describe_nonfinite(self, self._nonfinite_step))

    def locate_nonfinite(self) -> str:
        """Returns where the last non-finite step went wrong."""
        return nonfinite.locate_nonfinite(self, self._nonfinite_step)

    def evaluate(self, batches_of: Callable[[int], Sequence[Batch]], count: int) -> Evaluation:
        """Returns the mean loss and measures over `count` global batches."""
        sums, tokens = [0.0] * (1 + len(self.objective.measures)), 0
        for number in range(count):
            batches = batches_of(number)
            microbatches = self._make_microbatches(batches, None)
            self._set_reference(microbatches)
            losses = self._forward(microbatches)
            _, *totals = self._totals(losses, microbatches, 1)
            sums = [a + b for a, b in zip(sums, totals, strict=True)]
            tokens += self._count(batches)
        loss, *measures = (total / tokens for total in sums)
        return Evaluation(loss, dict(zip(self.objective.measures, measures, strict=True)))

    def log_probs(self, batches: Sequence[Batch]) -> list[Microbatch]:
        """Returns microbatches with the log-probability of each sequence, without adapters.

        Only those of the last stage have them.
        """
        microbatches = self._make_microbatches(batches, None)
        self._forward_without_adapters(microbatches)
        return microbatches

    def _make_microbatches(self, batches: Sequence[Batch], step: int | None) -> list[Microbatch]:
        return [
            self.microbatch_factory.make(batch, step=step, index=index)
            for index, batch in enumerate(batches)
        ]

    def _set_reference(self, microbatches: list[Microbatch]) -> None:
        """Gives each microbatch the reference log-probabilities of its sequences."""
        if self.ref_logprobs is not None:
            self.ref_logprobs.attach(microbatches)
        elif reference_mode(self.config) == "adapters-off":
            # A trace holds the actions of the schedule only.
            records, self.executor.action_timings = self.executor.action_timings, None
            self._forward_without_adapters(microbatches)
            self.executor.action_timings = records
            for microbatch in microbatches:
                microbatch.reference = microbatch.log_probs

    def _forward_without_adapters(self, microbatches: list[Microbatch]) -> None:
        for microbatch in microbatches:
            microbatch.adapters = False
        self._forward(microbatches)
        for microbatch in microbatches:
            microbatch.adapters = True

    def _forward(self, microbatches: list[Microbatch]) -> list[Tensor]:
        """Runs forwards without dropout and gradients."""
        self.stage.eval()
        return self.executor.run(self.forward_instructions, microbatches, backward=None)

    def _totals(
        self,
        losses: list[Tensor],
        microbatches: list[Microbatch],
        count: int,
        *,
        has_nonfinite: bool = False,
    ) -> list[float]:
        """Sums numbers of all ranks, so that all ranks decide alike.

        Returns:
            The number of ranks with `has_nonfinite`, the loss and the measures, each divided by
            `count`. The first tensor rank of the last stage contributes the loss and the measures.
        """
        totals = torch.zeros(2 + len(self.objective.measures), dtype=torch.float64)
        totals[0] = float(has_nonfinite)
        if losses and self.mesh.tensor.rank == 0:
            totals[1] = torch.stack(losses).double().sum()
            for microbatch in microbatches if self.objective.measures else []:
                assert microbatch.measured is not None, "set by the objective"
                totals[2:] += microbatch.measured.double().cpu()
        totals = collectives.all_reduce(totals.to(self.device), self.mesh.world)
        return (totals / count).tolist()

    def _count(self, batches: Sequence[Batch]) -> int:
        """Returns the number of tokens with a loss, or pairs, in the global batch."""
        count = torch.tensor(
            sum(self.objective.count(batch.labels) for batch in batches), device=self.device
        )
        return int(collectives.all_reduce(count, self.mesh.data))
