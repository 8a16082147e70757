"""One training step and one evaluation, on one rank."""

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
from megatrain.models.microbatch import Microbatch
from megatrain.models.microbatches import MicrobatchFactory
from megatrain.models.quantize import quantize_linears
from megatrain.models.transformer import Head
from megatrain.ops.dtypes import DTYPES
from megatrain.optim.lr_schedule import learning_rate
from megatrain.optim.zero import StepResult, ZeroOptimizer
from megatrain.pipeline.communication import add_communication
from megatrain.pipeline.executor import Executor
from megatrain.pipeline.p2p import P2PCommunicator
from megatrain.pipeline.schedule import Schedule
from megatrain.pipeline.schedules import forward_only
from megatrain.pipeline.stage_builder import build_stage, run_schedule
from megatrain.pipeline.verify import check_schedule
from megatrain.training import nonfinite
from megatrain.training.nonfinite import NonFiniteStep
from megatrain.training.ref_logprobs import ReferenceLogProbs


class StepReport(NamedTuple):
    """The same on every rank. `loss` is the mean over the step's tokens, or pairs; `measures` are the objective's, likewise.

    `why` says what was wrong with a step that was not applied. A `rescaled` one has gradients too large for fp16 at its loss scale,
    which is lower afterwards: that is how the scale is found, and nothing bad.
    """

    loss: float
    grad_norm: float
    lr: float
    applied: bool
    measures: dict[str, float]
    reason: str = ""
    rescaled: bool = False


class Evaluation(NamedTuple):
    """The same on every rank: means over the tokens, or pairs, of all batches."""

    loss: float
    measures: dict[str, float]


def reference_mode(config: Config) -> Literal["none", "adapters-off", "beforehand"]:
    """How log-probabilities to compare with are found, where the task compares."""
    if config.task != "dpo":
        return "none"
    if config.preference.reference == "auto":
        return "adapters-off" if config.lora.rank else "beforehand"
    return config.preference.reference


class StepRunner:
    """A rank's stage with its optimizer and schedule. All ranks call its methods together.

    Args:
        pretrained: gives weights; their own initial values unless given.
        schedule: in place of the one that the config names.
        channels: to the pipeline's other ranks, made here unless given.
        optimizer: what takes in the gradients.
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
        self.config, self.architecture, self.mesh, self.device = config, architecture, mesh, device
        self.microbatches = config.microbatches(mesh.data.size)
        self.objective = make_objective(config.task, config.preference)
        self.ref_logprobs: ReferenceLogProbs | None = None
        self.set_schedule(schedule or run_schedule(config, mesh.data.size))
        placement = self.schedule.placement
        stage = build_stage(config, architecture, mesh, str(device), placement)
        if config.lora.quantize != "none":
            source = initialize_parameter if pretrained is None else pretrained.load_parameter
            quantize_linears(stage, device=device, fill=partial(source, seed=config.run.seed))
        if config.lora.rank:
            add_adapters(stage, architecture, config.lora, mesh.tensor)
        if pretrained is None:
            initialize(stage, config.run.seed)
        else:
            pretrained.load_weights(stage, config.run.seed)
        set_magnitudes(stage)
        for head in (layer for layer in stage.layers if isinstance(layer, Head)):
            head.objective = self.objective
        self.optimizer = optimizer(
            stage,
            settings=config.optimizer,
            parallel=config.parallel,
            dtype=DTYPES[config.train.dtype],
            mesh=mesh,
            microbatches=self.microbatches,
        )
        if pretrained is not None:
            pretrained.load_master_weights(self.optimizer)
        self.stage = stage
        length = config.data.sequence_length // (
            mesh.tensor.size if config.parallel.sequence else 1
        )
        if channels is None and mesh.pipeline.size > 1:
            channels = P2PCommunicator(mesh.pipeline, ring=placement.chunks > 1)
        self.executor = Executor(
            self.optimizer.module,
            communicator=channels,
            hidden_shape=(length, config.train.micro_batch_size, architecture.hidden_size),
            dtype=DTYPES[config.train.dtype],
            device=device,
            activity=mesh.activity,
        )
        self.microbatch_factory = MicrobatchFactory(config, architecture, mesh, device)

    def set_schedule(self, schedule: Schedule) -> None:
        """Go on with another schedule of the same placement; it must be legal."""
        check_schedule(schedule, self.microbatches)
        self.schedule = schedule
        self.instructions = add_communication(schedule)[self.mesh.pipeline.rank]
        self.forward_instructions = add_communication(forward_only(schedule))[
            self.mesh.pipeline.rank
        ]

    # -- a step ------------------------------------------------------------------------------------------------------

    def train_step(self, step: int, batches: Sequence[Batch]) -> StepReport:
        """Train on this data rank's microbatches; `step` counts from 1."""
        microbatches = [
            self.microbatch_factory.make(batch, step=step, index=index)
            for index, batch in enumerate(batches)
        ]
        self._refer(microbatches)
        self.stage.train()
        count = self._count(batches)
        weight = torch.tensor(
            self.mesh.data.size * self.optimizer.loss_scale / count, device=self.device
        )
        losses = self.executor.run(
            self.instructions, microbatches, backward=self.optimizer.backward, loss_weight=weight
        )
        largest = self.optimizer.max_abs_gradients()
        bad, loss, *measured = self._totals(
            losses, microbatches, count, bad=self.optimizer.has_nonfinite(largest)
        )
        measures = dict(zip(self.objective.measures, measured, strict=True))
        lr = learning_rate(
            step,
            peak=self.config.optimizer.lr,
            schedule=self.config.lr_schedule,
            steps=self.config.steps,
        )
        if bad or not math.isfinite(loss):
            self.optimizer.zero_grad()
            result = StepResult(math.nan, False)
        else:
            result = self.optimizer.step(lr)
        report = StepReport(
            loss, result.grad_norm, lr, result.applied, measures, rescaled=result.rescaled
        )
        if result.applied or result.rescaled:
            return report
        self._bad = NonFiniteStep(microbatches, losses, largest)
        return report._replace(reason=nonfinite.describe_nonfinite(self, self._bad))

    def locate_nonfinite(self) -> str:
        """Where the last bad step went wrong."""
        return nonfinite.locate_nonfinite(self, self._bad)

    def evaluate(self, batches_of: Callable[[int], Sequence[Batch]], count: int) -> Evaluation:
        """Mean loss and measures over `count` global batches."""
        sums, counted = [0.0] * (1 + len(self.objective.measures)), 0
        for number in range(count):
            batches = batches_of(number)
            microbatches = [
                self.microbatch_factory.make(batch, step=None, index=index)
                for index, batch in enumerate(batches)
            ]
            self._refer(microbatches)
            losses = self._forward(microbatches)
            _, *totals = self._totals(losses, microbatches, 1)
            sums = [a + b for a, b in zip(sums, totals, strict=True)]
            counted += self._count(batches)
        loss, *measures = (total / counted for total in sums)
        return Evaluation(loss, dict(zip(self.objective.measures, measures, strict=True)))

    def log_probs(self, batches: Sequence[Batch]) -> list[Microbatch]:
        """The microbatches' contexts with each sequence's log-probability, on the last stage, by the model without adapters."""
        microbatches = [
            self.microbatch_factory.make(batch, step=None, index=index)
            for index, batch in enumerate(batches)
        ]
        self._forward_without_adapters(microbatches)
        return microbatches

    def _refer(self, microbatches: list[Microbatch]) -> None:
        """Give each microbatch the log-probabilities that it is compared with."""
        if self.ref_logprobs is not None:
            self.ref_logprobs.attach(microbatches)
        elif reference_mode(self.config) == "adapters-off":
            records, self.executor.action_timings = (
                self.executor.action_timings,
                None,
            )  # a traced step is its schedule's actions
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
        """Without dropout and gradients."""
        self.stage.eval()
        return self.executor.run(self.forward_instructions, microbatches, backward=None)

    def _totals(
        self, losses: list[Tensor], microbatches: list[Microbatch], count: int, *, bad: bool = False
    ) -> list[float]:
        """Whether any rank has something bad (more than 0), loss and measures, summed over microbatches, replicas and stages, by `count`.

        The last stage's first tensor rank speaks for its copies. All ranks get the same numbers, and so decide alike.
        """
        totals = torch.zeros(2 + len(self.objective.measures), dtype=torch.float64)
        totals[0] = float(bad)
        if losses and self.mesh.tensor.rank == 0:
            totals[1] = torch.stack(losses).double().sum()
            for microbatch in microbatches if self.objective.measures else []:
                assert microbatch.measured is not None, "left by the objective"
                totals[2:] += microbatch.measured.double().cpu()
        totals = collectives.all_reduce(totals.to(self.device), self.mesh.world)
        return (totals / count).tolist()

    def _count(self, batches: Sequence[Batch]) -> int:
        """Tokens with a loss, or pairs, in the global batch."""
        count = torch.tensor(
            sum(self.objective.count(batch.labels) for batch in batches), device=self.device
        )
        return int(collectives.all_reduce(count, self.mesh.data))
