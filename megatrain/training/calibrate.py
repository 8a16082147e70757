"""Measurements of a run's stages before its first step: time and memory of layers, time of steps.

The steps are those of the run, on its own data and with its messages, but their gradients are
discarded (optim/null.py). No optimizer state exists yet, so another partition of the layers can be
chosen without moving any.
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
from megatrain.training.trace_recorder import Layer, TraceRecorder, local_layers

TRACED = 2
"""Steps of each schedule that are recorded."""
TIMED = 3
"""Steps of which the fastest counts: other load can only make a step slower."""


class ScheduleProfiler:
    """Measures schedules of a run. All ranks create it and call its methods together.

    Attributes:
        channels: the communicator of all measurements and of the run itself: each one holds
            connections and buffers.
    """

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

    def base(self, config: Config, schedule: Schedule) -> tuple[MeasuredCosts | None, float]:
        """Returns the costs of the layers (on rank 0), and the seconds of a step, under 1F1B."""
        runner = self._runner(config, schedule)
        costs = self._costs(runner)
        return costs, min(self._step_seconds(runner) for _ in range(TIMED))

    def seconds(self, config: Config, schedule: Schedule) -> float:
        """Returns the seconds of a step without its update, the same on all ranks.

        A step lasts as long as its slowest rank; the fastest of several steps counts.
        """
        runner = self._runner(config, schedule)
        runner.train_step(1, self.batches)
        return min(self._step_seconds(runner) for _ in range(TIMED))

    def clear(self) -> None:
        """Frees the memory of the last runner."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _runner(self, config: Config, schedule: Schedule) -> StepRunner:
        """Builds a runner that discards gradients, after freeing the previous one."""
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
        """Measures forwards and complete backwards under 1F1B, and split backwards under ZB-H1.

        Only the first tensor rank of the first replica counts; differences of others show in the
        seconds of complete steps.
        """
        with layer_bytes(local_layers(runner), self._state_bytes_per_weight()) as sizes:
            runner.train_step(1, self.batches)
        traces: list[RankTrace] = []
        recorder = TraceRecorder(runner, Path(), range(2 * TRACED), keep=traces.append)
        plain = runner.schedule
        for number, schedule in enumerate(
            (plain, build_schedule("zb-h1", self.mesh.pipeline.size, runner.microbatches))
        ):
            runner.set_schedule(schedule)
            for step in range(number * TRACED, (number + 1) * TRACED):
                with recorder.record(step):
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
        """Returns the bytes per weight of fp32 gradient, master weight and optimizer state."""
        p = self.config.parallel
        optimizer = 4 * (1 + len(STATES[self.config.optimizer.name]))
        share = 0.0 if p.offload == "cpu" else optimizer / (self.mesh.data.size if p.zero else 1)
        return 4 + share


def _costs_of(traces: list[list[RankTrace]], sizes: list[LayerSize]) -> MeasuredCosts:
    """Returns the costs from the traces and layer sizes of each pipeline rank."""
    steps = [StepTrace(of_step[0].step, list(of_step)) for of_step in zip(*traces, strict=True)]
    ordered = sorted(sizes)
    layers = LayerBytes([size.states for size in ordered], [size.activations for size in ordered])
    return MeasuredCosts(cost_model(measure_pipelines(steps, statistics.median)), layers)


# -- memory --------------------------------------------------------------------------------------


class LayerSize(NamedTuple):
    """Bytes of a layer on a rank.

    Attributes:
        number: the index in the model's list of layers.
        states: bytes of weights, gradients and optimizer state.
        activations: bytes that the forward of a microbatch keeps for its backward.
    """

    number: int
    states: float
    activations: float


@contextmanager
def layer_bytes(chunks: list[list[Layer]], per_weight: float) -> Iterator[list[LayerSize]]:
    """Measures the layers by what autograd saves in their first forward inside the block.

    Args:
        chunks: the layers of each virtual stage.
        per_weight: bytes of gradient and optimizer state for each trained weight.

    Yields:
        A list that contains the sizes after the block.
    """
    layers = [layer for chunk in chunks for layer in chunk]
    kept = _Kept(
        {
            parameter.untyped_storage().data_ptr()
            for layer in layers
            for parameter in layer.module.parameters()
        }
    )
    handles = [layer.module.register_forward_pre_hook(kept.enter(layer.number)) for layer in layers]
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
        sizes.append(LayerSize(layer.number, states, float(kept.bytes.get(layer.number, 0))))


class _Kept:
    """Counts the storages that autograd saves, each once, by the layer that runs."""

    def __init__(self, weights: set[int]) -> None:
        self.seen = weights
        self.bytes: dict[int, int] = {}
        self.number: int | None = None

    def enter(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            # Only the first microbatch: later storages may reuse the addresses of earlier ones.
            self.number = number if torch.is_grad_enabled() and number not in self.bytes else None
            if self.number is not None:
                self.bytes[number] = 0

        return hook

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.number = None

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self.number is not None and storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes[self.number] += storage.nbytes()
        return tensor
