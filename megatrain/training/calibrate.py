"""Measures a run's real stages before its first step: what each layer takes and holds, and how long whole steps last.

Steps are those of the run, on its own data and with its messages, but their gradients are thrown away (optim/discard.py): no
state of the training exists yet, so nothing has to move when another cut of the layers turns out to be faster.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.distributed.collectives import all_reduce, barrier, gather_objects
from megatrain.distributed.mesh import ProcessMesh
from megatrain.models.config import TransformerConfig
from megatrain.models.quantize import quantized_bytes
from megatrain.optim.null import NullOptimizer
from megatrain.optim.param_groups import STATES
from megatrain.pipeline.p2p import P2PCommunicator
from megatrain.pipeline.schedule import Schedule
from megatrain.pipeline.schedules import build_schedule
from megatrain.planner.cost_model import cost_model
from megatrain.planner.schedule_search import LayerBytes, MeasuredCosts
from megatrain.telemetry.bubble_analysis import measure_pipelines
from megatrain.telemetry.trace_format import RankTrace, StepTrace
from megatrain.training.step_runner import StepRunner
from megatrain.training.trace_recorder import Layer, Tracer, own_layers

TRACED = 2
"""Steps of each schedule whose actions are recorded."""
TIMED = 3
"""Steps of which the fastest counts: what else a machine does can only make one slower."""


class ScheduleProfiler:
    """The parts that every measurement of a run shares. All ranks make it and call its methods together."""

    def __init__(
        self,
        config: Config,
        architecture: TransformerConfig,
        mesh: ProcessMesh,
        device: torch.device,
        batches: Sequence[Batch],
    ) -> None:
        self.config, self.architecture, self.mesh, self.device, self.batches = (
            config,
            architecture,
            mesh,
            device,
            batches,
        )
        self.channels = P2PCommunicator(mesh.pipeline, ring=True)
        """The run's own too: each would hold connections and buffers."""

    def base(self, config: Config, schedule: Schedule) -> tuple[MeasuredCosts | None, float]:
        """What layers take and hold, on rank 0, and `seconds`, of 1F1B."""
        runner = self._trainer(config, schedule)
        costs = self._costs(runner)
        return costs, min(self._step_seconds(runner) for _ in range(TIMED))

    def seconds(self, config: Config, schedule: Schedule) -> float:
        """Of a step without its update: of the slowest rank, the fastest of some; the same on all ranks."""
        runner = self._trainer(config, schedule)
        runner.train_step(1, self.batches)
        return min(self._step_seconds(runner) for _ in range(TIMED))

    def clear(self) -> None:
        """Let go of what the last runner held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _trainer(self, config: Config, schedule: Schedule) -> StepRunner:
        """One that learns nothing, in the place of the one before."""
        self.clear()
        return StepRunner(
            config,
            self.architecture,
            self.mesh,
            self.device,
            schedule=schedule,
            channels=self.channels,
            optimizer=NullOptimizer,
        )

    def _step_seconds(self, runner: StepRunner) -> float:
        barrier(self.mesh.world)
        started = time.perf_counter()
        runner.train_step(1, self.batches)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = torch.tensor(
            time.perf_counter() - started, dtype=torch.float64, device=self.device
        )
        return float(all_reduce(seconds, self.mesh.world, op=dist.ReduceOp.MAX))

    def _costs(self, runner: StepRunner) -> MeasuredCosts | None:
        """Forwards and whole backwards from 1F1B, backwards in two parts from ZB-H1.

        Of the first replica's first tensor ranks: what others do differently shows in the seconds of whole steps.
        """
        with layer_bytes(own_layers(runner), self._state_bytes_per_weight()) as sizes:
            runner.train_step(1, self.batches)
        traces: list[RankTrace] = []
        tracer = Tracer(runner, Path(), steps=range(2 * TRACED), keep=traces.append)
        plain = runner.schedule
        for number, schedule in enumerate(
            (plain, build_schedule("zb-h1", self.mesh.pipeline.size, runner.microbatches))
        ):
            runner.set_schedule(schedule)
            for step in range(number * TRACED, (number + 1) * TRACED):
                with tracer.watch(step):
                    runner.train_step(1, self.batches)
        runner.set_schedule(plain)
        found = gather_objects((traces, sizes), self.mesh.pipeline)
        return (
            _costs_of(
                [of_rank for of_rank, _ in found],
                [size for _, of_rank in found for size in of_rank],
            )
            if self.mesh.rank == 0
            else None
        )

    def _state_bytes_per_weight(self) -> float:
        """Of the run, beside the weight: its fp32 gradient, and this rank's share of master and states."""
        p = self.config.parallel
        optimizer = 4 * (1 + len(STATES[self.config.optimizer.name]))
        share = 0.0 if p.offload == "cpu" else optimizer / (self.mesh.data.size if p.zero else 1)
        return 4 + share


def _costs_of(traces: list[list[RankTrace]], sizes: list[LayerSize]) -> MeasuredCosts:
    """From each pipeline rank's traced steps and layers."""
    steps = [StepTrace(of_step[0].step, list(of_step)) for of_step in zip(*traces, strict=True)]
    ordered = sorted(sizes)
    layers = LayerBytes([size.states for size in ordered], [size.activations for size in ordered])
    return MeasuredCosts(cost_model(measure_pipelines(steps, statistics.median)), layers)


# -- memory ------------------------------------------------------------------------------------------------------------


class LayerSize(NamedTuple):
    """Bytes of a layer on a rank."""

    place: int
    """In the whole model's list of layers."""
    states: float
    activations: float
    """That one microbatch's forward leaves for its backward."""


@contextmanager
def layer_bytes(chunks: list[list[Layer]], per_weight: float) -> Iterator[list[LayerSize]]:
    """Sizes of these layers, from what autograd keeps of each one's first forward inside the block; filled at its end.

    `per_weight`: bytes for each weight that is trained, beside its own.
    """
    layers = [layer for chunk in chunks for layer in chunk]
    kept = _Kept(
        {
            parameter.untyped_storage().data_ptr()
            for layer in layers
            for parameter in layer.module.parameters()
        }
    )
    handles = [layer.module.register_forward_pre_hook(kept.enter(layer.place)) for layer in layers]
    handles += [layer.module.register_forward_hook(kept.leave) for layer in layers]
    sizes: list[LayerSize] = []
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            yield sizes
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        states = sum(
            parameter.nbytes + parameter.requires_grad * parameter.numel() * per_weight
            for parameter in layer.module.parameters()
        )
        states += quantized_bytes(layer.module)
        sizes.append(LayerSize(layer.place, states, float(kept.bytes.get(layer.place, 0))))


class _Kept:
    """Counts the storages that autograd keeps, each once, by the layer that is at work."""

    def __init__(self, weights: set[int]) -> None:
        self.seen = weights
        self.bytes: dict[int, int] = {}
        self.place: int | None = None

    def enter(self, place: int) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            # The first microbatch's alone: later storages may lie where earlier ones were.
            self.place = place if torch.is_grad_enabled() and place not in self.bytes else None
            if self.place is not None:
                self.bytes[place] = 0

        return hook

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.place = None

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self.place is not None and storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes[self.place] += storage.nbytes()
        return tensor
