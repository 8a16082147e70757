"""Predicts the memory of every rank of a layout, without ranks and without allocating memory.

Each stage is built on the meta device. Each distinct layer runs there once (activation_memory.py),
and the schedule determines how many microbatches a rank holds at each action. A rank's memory is
the maximum over its actions and the update: weights, gradients, optimizer state, activations of the
microbatches in flight, and the temporaries of the action.

Not included: memory of the driver and of communication libraries, fragmentation, and memory that a
kernel takes inside one op.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import shard_spec
from megatrain.distributed.tensor_parallel import ColumnParallelLinear
from megatrain.models.lora import add_adapters
from megatrain.models.losses import make_objective
from megatrain.models.microbatch import Microbatch, MicrobatchFactory
from megatrain.models.quantize import quantized_weights
from megatrain.models.transformer import Head, LayerSpec
from megatrain.ops.dtypes import DTYPES
from megatrain.ops.nf4 import NF4Weight
from megatrain.pipeline.executor import Stage
from megatrain.pipeline.p2p import P2PCommunicator
from megatrain.pipeline.schedule import Action, Schedule
from megatrain.pipeline.stage_builder import build_layers_of, rank_specs
from megatrain.planner.activation_memory import (
    ActivationFootprint,
    layer_chain,
    layer_signature,
    measure,
)
from megatrain.planner.optimizer_memory import StateSizes, state_sizes
from megatrain.planner.run_spec import RunSpec
from megatrain.planner.tensor_tracker import TensorTracker


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank holds on its device.

    Attributes:
        parameters: number of elements.
        activations: of the microbatches in flight, at the moment of peak memory.
        working: everything else at that moment: temporaries of the action, messages, buffers and
            the inputs of the step's microbatches.
        update: temporaries of gradient reduction and update, which are at another moment.
        host: bytes in CPU memory, with offload.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    update: int
    host: int = 0

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Peak memory."""
        return self.states + max(self.activations + self.working, self.update)


def predict(spec: RunSpec, *, schedule: Schedule | None = None) -> list[RankMemory]:
    """Returns the memory of each pipeline rank; its tensor and data ranks hold equal sizes.

    Args:
        schedule: replaces the config's schedule.
    """
    if schedule is None:
        # CPUs hold all messages of a step, so every microbatch counts.
        schedule = spec.schedule if spec.cluster.device == "cpu" else spec.memory_schedule
    predictor = _Predictor(spec, schedule)
    layers = rank_specs(spec.config, spec.model, schedule.placement)
    return [predictor.predict_rank(rank, stages) for rank, stages in enumerate(layers)]


def heaviest(ranks: Iterable[RankMemory]) -> int:
    """Returns the pipeline rank with the highest peak memory."""
    totals = [rank.total for rank in ranks]
    return totals.index(max(totals))


class _Predictor:
    """Predicts the ranks of a run; each distinct layer is measured once."""

    def __init__(self, spec: RunSpec, schedule: Schedule) -> None:
        self.spec, self.schedule = spec, schedule
        self.on_cpu = spec.cluster.device == "cpu"
        self.splits_backward = any(
            action.kind == "I" for actions in schedule.actions for action in actions
        )
        config, parallel = spec.config, spec.config.parallel
        self.dtype = DTYPES[config.train.dtype]
        length = config.data.sequence_length // (parallel.tensor if parallel.sequence else 1)
        self.hidden_shape = (length, config.train.micro_batch_size, spec.model.hidden_size)
        self.message_bytes = torch.Size(self.hidden_shape).numel() * self.dtype.itemsize
        self.microbatch, self.input_bytes = _meta_microbatch(spec)
        self._footprints: dict[object, ActivationFootprint] = {}

    def predict_rank(self, rank: int, layers: list[list[LayerSpec]]) -> RankMemory:
        config = self.spec.config
        stage = self._build_stage(rank, layers)
        states = state_sizes(
            stage,
            optimizer=config.optimizer,
            dtype=config.train.dtype,
            zero=config.parallel.zero,
            offload=config.parallel.offload == "cpu",
            data_size=self.spec.data_size,
        )
        peak = peak_of(
            self.schedule,
            rank,
            self._stage_footprints(stage),
            message_bytes=self.message_bytes,
            on_cpu=self.on_cpu,
        )
        return self._rank_memory(stage, states, peak)

    def _build_stage(self, rank: int, layers: list[list[LayerSpec]]) -> Stage:
        config, parallel = self.spec.config, self.spec.config.parallel
        mesh = make_mesh(
            rank * parallel.tensor,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            connect=False,
        )
        stage = build_layers_of(
            layers,
            config=config,
            architecture=self.spec.model,
            mesh=mesh,
            device="meta",
            dtype=self.dtype,
        )
        if config.lora.quantize != "none":
            _quantize(stage)
        if config.lora.rank:
            add_adapters(stage, self.spec.model, config.lora, mesh.tensor)
        return stage

    def _stage_footprints(self, stage: Stage) -> list[ActivationFootprint]:
        """Returns the footprint of each virtual stage."""
        if self.spec.config.parallel.zero < 2:
            for parameter in stage.parameters():
                if parameter.requires_grad:
                    parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        return [
            layer_chain([self._footprint(layer) for layer in chunk])  # type: ignore[attr-defined]
            for chunk in stage.chunks
        ]

    def _footprint(self, layer: torch.nn.Module) -> ActivationFootprint:
        signature = layer_signature(layer)
        if signature not in self._footprints:
            if isinstance(layer, Head):
                config = self.spec.config
                layer.objective = make_objective(config.task, config.preference)
            self._footprints[signature] = measure(
                layer,
                self.microbatch,
                hidden_shape=self.hidden_shape,
                dtype=self.dtype,
                device=self.spec.cluster.device,
                splits_backward=self.splits_backward,
            )
        return self._footprints[signature]

    def _rank_memory(self, stage: Stage, states: StateSizes, peak: PeakMoment) -> RankMemory:
        quantized = quantized_weights(stage)
        num_parameters = sum(parameter.numel() for parameter in stage.parameters())
        return RankMemory(
            parameters=num_parameters + sum(weight.shape.numel() for weight in quantized),
            weights=states.weights + sum(weight.nbytes for weight in quantized),
            gradients=states.gradients,
            optimizer=states.optimizer + (states.host if self.on_cpu else 0),
            activations=peak.kept,
            working=peak.working + states.buffers + self.input_bytes,
            update=states.update + self.input_bytes,
            host=0 if self.on_cpu else states.host,
        )


def _quantize(stage: Stage) -> None:
    """Replaces the weights of linear layers by 4-bit weights without memory."""
    for module in stage.modules():
        if isinstance(module, ColumnParallelLinear):
            weight = module.weight
            del module.weight
            module.weight = NF4Weight.on_meta(weight, shard_spec(weight))  # type: ignore[assignment]


def _meta_microbatch(spec: RunSpec) -> tuple[Microbatch, int]:
    """Returns a microbatch on the meta device, and the bytes of all microbatches of a step.

    They exist from the start of the step to its end, with the masks that their layers request.
    """
    config, model = spec.config, spec.model
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    factory = MicrobatchFactory(
        model,
        make_mesh(0, connect=False),
        torch.device("meta"),
        dtype=DTYPES[config.train.dtype],
        separate_documents=config.data.document_mask or config.data.packing,
        seed=config.run.seed,
    )
    windows = {model.window(layer) for layer in range(model.num_layers)}
    sizes = []
    with TensorTracker() as tracker:
        microbatches = []
        for index in range(2):  # the second one shares tensors with the first
            before = tracker.bytes
            batch = Batch(*(torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(4)))
            microbatches.append(factory.make(batch, step=1, index=index))
            del batch
            for window in windows:
                microbatches[-1].mask(window)
            sizes.append(tracker.bytes - before)
    shared = sizes[0] - sizes[1]
    return microbatches[0], shared + sizes[1] * spec.microbatches


# -- peak of a schedule ----------------------------------------------------------------------------


class PeakMoment(NamedTuple):
    """Bytes during an action: activations kept, and temporaries of the action with messages."""

    kept: int
    working: int


def peak_of(
    schedule: Schedule,
    rank: int,
    chunks: list[ActivationFootprint],
    *,
    message_bytes: int,
    on_cpu: bool,
) -> PeakMoment:
    """Returns the moment at which a rank holds most.

    A virtual stage keeps a received message until its backward is done. CPUs post all receives of a
    step at its start (pipeline/executor.py), and the last sends may be pending. GPUs receive a
    message when they need it.

    Args:
        chunks: the footprint of each virtual stage of the rank.
    """
    messages = _Messages(schedule, rank, on_cpu)
    peak, kept = PeakMoment(0, 0), 0
    for action in schedule.actions[rank]:
        messages.receive(action)
        chunk = chunks[action.chunk]
        received = message_bytes if messages.is_received(action) else 0
        if action.kind == "F":
            needed, change = received + chunk.forward, received + chunk.kept
        elif action.kind == "B":
            needed, change = chunk.backward, -received - chunk.kept
        elif action.kind == "I":
            needed, change = chunk.input_backward, chunk.deferred - received - chunk.kept
        else:
            needed, change = chunk.weight_backward, -chunk.deferred
        working = needed + messages.count * message_bytes
        if kept + working > peak.kept + peak.working:
            peak = PeakMoment(kept, working)
        kept += change
        messages.send(action)
    return peak


class _Messages:
    """Messages in memory that no action keeps: posted receives and pending sends."""

    def __init__(self, schedule: Schedule, rank: int, on_cpu: bool) -> None:
        self.placement, self.rank, self.on_cpu = schedule.placement, rank, on_cpu
        self.posted = (
            sum(self._needs_message(action) for action in schedule.actions[rank]) if on_cpu else 0
        )
        self.pending: deque[Action] = deque(
            maxlen=P2PCommunicator.MAX_PENDING_SENDS if on_cpu else 1
        )
        self.in_flight: set[tuple[int, int]] = set()

    @property
    def count(self) -> int:
        """Messages, without outputs that their forward keeps."""
        return self.posted + sum(
            action.kind != "F" or action[1:] not in self.in_flight for action in self.pending
        )

    def receive(self, action: Action) -> None:
        if self.on_cpu and self._needs_message(action):
            self.posted -= 1

    def send(self, action: Action) -> None:
        if action.kind == "F":
            self.in_flight.add(action[1:])
        elif action.kind in ("B", "I"):
            self.in_flight.discard(action[1:])
        target = self.placement.consumer(self.rank, action)
        if target is not None and target.rank != self.rank:
            self.pending.append(action)

    def is_received(self, action: Action) -> bool:
        """Returns True if the forward of the action's virtual stage has an input from another."""
        forward = Action("F", action.microbatch, action.chunk)
        return self.placement.producer(self.rank, forward) is not None

    def _needs_message(self, action: Action) -> bool:
        source = self.placement.producer(self.rank, action)
        return source is not None and source.rank != self.rank
