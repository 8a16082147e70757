"""The memory of every rank of a layout, without a rank and without memory.

Each stage is built on the meta device, each of its layers that differs from the others is run there (footprint.py), and the schedule's
actions say how many microbatches each rank holds at once: at an action the rank holds weights, gradients, optimizer, what the
microbatches in flight have kept, and what the action itself takes. The most of that, or of the update, is the rank's memory.

Not in it: what the device's driver and communication libraries take for themselves, what an allocator rounds up or cannot use, and what
a kernel takes inside one op.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.tensor_parallel import ColumnParallelLinear
from megatrain.models.config import TransformerConfig
from megatrain.models.lora import add_adapters
from megatrain.models.losses import make_objective
from megatrain.models.microbatch import Microbatch
from megatrain.models.microbatches import MicrobatchFactory
from megatrain.models.quantize import quantized_weights
from megatrain.models.transformer import Head, LayerSpec
from megatrain.ops.dtypes import DTYPES
from megatrain.ops.nf4 import NF4Weight
from megatrain.pipeline.executor import Stage
from megatrain.pipeline.p2p import P2PCommunicator
from megatrain.pipeline.schedule import Action, Schedule
from megatrain.pipeline.stage_builder import (
    build_layers_of,
    memory_schedule,
    rank_specs,
    run_schedule,
)
from megatrain.planner.activation_memory import (
    ActivationFootprint,
    layer_chain,
    layer_signature,
    measure,
)
from megatrain.planner.optimizer_memory import StateSizes, state_sizes
from megatrain.planner.tensor_tracker import TensorTracker


@dataclass(frozen=True)
class RankMemory:
    """What a rank holds, in bytes on its device.

    Attributes:
        parameters: elements.
        activations: of the microbatches in flight, at the moment that takes most.
        working: what else there is at that moment: the action at work, messages, buffers, the step's microbatches.
        update: what reducing and updating take, beside weights, gradients and optimizer; not at that moment.
        host: in CPU memory, under offload.
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
        """The most at once."""
        return self.states + max(self.activations + self.working, self.update)


def predict(
    config: Config,
    architecture: TransformerConfig,
    *,
    data_size: int,
    device: str,
    schedule: Schedule | None = None,
) -> list[RankMemory]:
    """By pipeline rank, of any of its tensor and data ranks: those hold parts of the same size.

    `device`: cuda or cpu, of the ranks that train; `schedule`: in place of the config's own.
    """
    if schedule is None:  # on CPUs all messages of a step count, and on GPUs only what is held
        schedule = (
            run_schedule(config, data_size)
            if device == "cpu"
            else memory_schedule(config, data_size)
        )
    layers = _Layers(
        config,
        architecture,
        data_size,
        device,
        split=any(a.kind == "I" for actions in schedule.actions for a in actions),
    )
    specs = rank_specs(config, architecture, schedule.placement)
    return [layers.rank(rank, chunks, schedule) for rank, chunks in enumerate(specs)]


class _Layers:
    """Footprints of a model's layers, each kind measured once."""

    def __init__(
        self,
        config: Config,
        architecture: TransformerConfig,
        data_size: int,
        device: str,
        *,
        split: bool,
    ) -> None:
        self.config, self.architecture, self.data_size, self.device, self.split = (
            config,
            architecture,
            data_size,
            device,
            split,
        )
        p, train = config.parallel, config.train
        self.dtype = DTYPES[train.dtype]
        length = config.data.sequence_length // (p.tensor if p.sequence else 1)
        self.hidden_shape = (length, train.micro_batch_size, architecture.hidden_size)
        self.message_bytes = (
            length * train.micro_batch_size * architecture.hidden_size * self.dtype.itemsize
        )
        self.microbatch, self.shared, self.each = _meta_microbatch(config, architecture)
        self._seen: dict[object, ActivationFootprint] = {}

    def rank(self, rank: int, specs: list[list[LayerSpec]], schedule: Schedule) -> RankMemory:
        config, p = self.config, self.config.parallel
        mesh = make_mesh(rank * p.tensor, tensor=p.tensor, pipeline=p.pipeline, connect=False)
        stage = build_layers_of(
            specs,
            config=config,
            architecture=self.architecture,
            mesh=mesh,
            device="meta",
            dtype=self.dtype,
        )
        if config.lora.quantize != "none":
            _quantize(stage)
        if config.lora.rank:
            add_adapters(stage, self.architecture, config.lora, mesh.tensor)
        sizes = state_sizes(stage, config, data_size=self.data_size)
        quantized = quantized_weights(stage)
        chunks = self._chunks(stage)
        moment = peak_of(
            schedule, rank, chunks, message_bytes=self.message_bytes, on_cpu=self.device == "cpu"
        )
        microbatch_bytes = self.shared + self.each * config.microbatches(self.data_size)
        parameters = sum(parameter.numel() for parameter in stage.parameters()) + sum(
            weight.shape.numel() for weight in quantized
        )
        sizes = sizes._replace(weights=sizes.weights + sum(weight.nbytes for weight in quantized))
        return _whole(parameters, sizes, moment, microbatch_bytes, on_cpu=self.device == "cpu")

    def _chunks(self, stage: Stage) -> list[ActivationFootprint]:
        if self.config.parallel.zero < 2:
            for parameter in stage.parameters():
                if parameter.requires_grad:
                    parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        return [layer_chain([self._layer(layer) for layer in chunk]) for chunk in stage.chunks]  # type: ignore[attr-defined]

    def _layer(self, layer: torch.nn.Module) -> ActivationFootprint:
        kind = layer_signature(layer)
        if kind not in self._seen:
            if isinstance(layer, Head):
                layer.objective = make_objective(self.config.task, self.config.preference)
            self._seen[kind] = measure(
                layer,
                self.microbatch,
                hidden_shape=self.hidden_shape,
                dtype=self.dtype,
                device=self.device,
                split=self.split,
            )
        return self._seen[kind]


def _quantize(stage: Stage) -> None:
    """In place of the linears' weights, what they become."""
    for module in stage.modules():
        if isinstance(module, ColumnParallelLinear):
            weight = module.weight
            del module.weight
            module.weight = NF4Weight.without_memory(weight)  # type: ignore[assignment]


def _whole(
    parameters: int, sizes: StateSizes, moment: PeakMoment, microbatch_bytes: int, *, on_cpu: bool
) -> RankMemory:
    optimizer = sizes.optimizer + (sizes.host if on_cpu else 0)
    return RankMemory(
        parameters,
        sizes.weights,
        sizes.gradients,
        optimizer,
        moment.kept,
        moment.working + sizes.buffers + microbatch_bytes,
        sizes.update + microbatch_bytes,
        0 if on_cpu else sizes.host,
    )


def _meta_microbatch(
    config: Config, architecture: TransformerConfig
) -> tuple[Microbatch, int, int]:
    """A microbatch's context without memory; bytes that all of a step's microbatches share, and of each.

    All of a step's are there from its start to its end, and with them the masks that their layers have asked for.
    """
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    microbatch_bytes = MicrobatchFactory(
        config, architecture, make_mesh(0, connect=False), torch.device("meta")
    )
    windows = {architecture.window(layer) for layer in range(architecture.num_layers)}
    sizes = []
    with TensorTracker() as live:
        held = []
        for index in range(2):
            before = live.bytes
            batch = Batch(*(torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(4)))
            held.append(microbatch_bytes.make(batch, step=1, index=index))
            del batch
            for window in windows:
                held[-1].mask(window)
            sizes.append(live.bytes - before)
    return held[0], sizes[0] - sizes[1], sizes[1]


# -- a schedule's moments ----------------------------------------------------------------------------------------------


class PeakMoment(NamedTuple):
    """What a rank holds while an action runs: activations kept, and what the action and the messages take beside them."""

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
    """The moment at which a rank holds most, its chunks' footprints and one message's bytes given.

    A chunk that takes in a message keeps it until its backward is done. On CPUs all messages of a step have their place from its start
    (`receives_first` in pipeline/executor.py), and the last ones sent may not have left; a GPU waits for what it needs.
    """
    messages = _Messages(schedule, rank, on_cpu)
    best, held = PeakMoment(0, 0), 0
    for action in schedule.actions[rank]:
        messages.take(action)
        chunk = chunks[action.chunk]
        entered = message_bytes if messages.enters(action) else 0
        if action.kind == "F":
            takes, after = entered + chunk.forward, held + entered + chunk.kept
        elif action.kind == "B":
            takes, after = chunk.backward, held - entered - chunk.kept
        elif action.kind == "I":
            takes, after = chunk.input_backward, held - entered - chunk.kept + chunk.deferred
        else:
            takes, after = chunk.weight_backward, held - chunk.deferred
        working = takes + messages.number * message_bytes
        if held + working > best.kept + best.working:
            best = PeakMoment(held, working)
        held = after
        messages.give(action)
    return best


class _Messages:
    """Those that have a place in memory and are not kept by an action: still to come, or not gone yet."""

    def __init__(self, schedule: Schedule, rank: int, on_cpu: bool) -> None:
        self.placement, self.rank, self.on_cpu = schedule.placement, rank, on_cpu
        self.coming = sum(self._comes(action) for action in schedule.actions[rank]) if on_cpu else 0
        self.leaving: deque[Action] = deque(
            maxlen=P2PCommunicator.MAX_PENDING_SENDS if on_cpu else 1
        )
        self.in_flight: set[tuple[int, int]] = set()

    @property
    def number(self) -> int:
        """An output that its forward keeps is not counted again."""
        return self.coming + sum(
            action.kind != "F" or action[1:] not in self.in_flight for action in self.leaving
        )

    def take(self, action: Action) -> None:
        if self.on_cpu and self._comes(action):
            self.coming -= 1

    def give(self, action: Action) -> None:
        if action.kind == "F":
            self.in_flight.add(action[1:])
        elif action.kind in ("B", "I"):
            self.in_flight.discard(action[1:])
        place = self.placement.consumer(self.rank, action)
        if place is not None and place.rank != self.rank:
            self.leaving.append(action)

    def enters(self, action: Action) -> bool:
        """Whether the chunk's forward takes in a message."""
        return (
            self.placement.producer(self.rank, Action("F", action.microbatch, action.chunk))
            is not None
        )

    def _comes(self, action: Action) -> bool:
        place = self.placement.producer(self.rank, action)
        return place is not None and place.rank != self.rank


def heaviest(ranks: Iterable[RankMemory]) -> int:
    """The pipeline rank that holds most."""
    found = list(ranks)
    return max(range(len(found)), key=lambda rank: found[rank].total)
