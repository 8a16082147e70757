"""A recorder of when each action of some steps ran on this rank, and how long its layers took.

A layer's forward lasts from the end of the previous layer to its own end. Its backward lasts from
the gradient of its output to that of its input. The marks are one forward hook and one gradient
hook per layer, which exist during recorded steps only. The layers of a deferred weight gradient (W)
are not distinguished. On GPUs the marks are events on the stream. They also show how long the
stream waited for a message, which the host does not wait for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from megatrain.config.loader import to_dict
from megatrain.distributed import device as device_module
from megatrain.distributed.collectives import broadcast_object
from megatrain.models.transformer import HiddenStates
from megatrain.pipeline.executor import ActionTiming
from megatrain.pipeline.stage_builder import rank_specs
from megatrain.telemetry.metrics import Value
from megatrain.telemetry.trace_format import RankTrace, TracedAction, write_trace
from megatrain.training.callback import Callback
from megatrain.training.shared_clock import Offset, SharedClock
from megatrain.training.step_runner import StepReport, StepRunner

if TYPE_CHECKING:
    from megatrain.training.trainer import Trainer

logger = logging.getLogger("megatrain")


class TraceRecorder(Callback):
    """Records `steps` into the folder of the run. All ranks create it and use it together.

    Args:
        runner: the runner whose steps are recorded.
        keep: receives each trace of this rank, which is then not written.
    """

    def __init__(
        self,
        runner: StepRunner,
        run_folder: Path,
        steps: range,
        *,
        keep: Callable[[RankTrace], Any] | None = None,
    ) -> None:
        self.runner, self.run_folder, self.steps, self.keep = runner, run_folder, steps, keep
        self._recording = ExitStack()
        self._run_id = broadcast_object(time.time(), runner.mesh.world)
        self._clock = SharedClock(runner.mesh.world)

    def on_step_begin(self, trainer: Trainer, step: int) -> None:
        """Starts to record the step, if it is one of `steps`."""
        if step in self.steps:
            self._recording.enter_context(self.record(step))

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Writes the trace of the step."""
        self._recording.close()

    @contextmanager
    def record(self, step: int) -> Iterator[None]:
        """Records what runs in the block as step `step`."""
        executor = self.runner.executor
        offset = self._clock.offset()
        device_module.reset_peak_memory(self.runner.device)
        executor.action_timings = []
        try:
            with layer_marks(local_layers(self.runner), self.runner.device) as marks:
                started = time.perf_counter()
                yield
                seconds = time.perf_counter() - started
            actions = traced_actions(
                executor.action_timings, marks.all(), offset, on_stream=marks.on_stream
            )
        finally:
            executor.action_timings = None
        trace = self._trace(step, seconds, actions, offset)
        if self.keep is None:
            self._write(trace)
        else:
            self.keep(trace)

    def _write(self, trace: RankTrace) -> None:
        try:
            write_trace(self.run_folder, trace)
        except OSError as error:  # a trace is not worth the end of the run
            logger.warning(f"the trace of step {trace.step} cannot be written: {error}")
        if trace.step == self.steps[-1] and trace.rank == 0:
            logger.info(
                f"recorded step {trace.step}; `megatrain profile {self.run_folder}` shows it"
            )

    def _trace(
        self, step: int, seconds: float, actions: list[TracedAction], offset: Offset
    ) -> RankTrace:
        runner, mesh = self.runner, self.runner.mesh
        memory = device_module.peak_memory(runner.device)
        return RankTrace(
            run=self._run_id,
            step=step,
            rank=mesh.rank,
            world_size=mesh.world_size,
            pipeline=mesh.pipeline.rank,
            data=mesh.data.rank,
            tensor=mesh.tensor.rank,
            schedule=runner.schedule.name,
            placement=runner.schedule.placement,
            stages=stage_titles(runner),
            seconds=seconds,
            peak_memory=memory.size,
            memory=memory.meaning,
            clock_error=offset.error,
            config=to_dict(runner.config),
            actions=actions,
        )


# -- layers --------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer of this rank, and its number in the whole model."""

    number: int
    module: nn.Module


def local_layers(runner: StepRunner) -> list[list[Layer]]:
    """Returns the layers of this rank by virtual stage."""
    placement, rank = runner.schedule.placement, runner.mesh.pipeline.rank
    sizes = [len(stage) for stage in stage_titles(runner)]
    layers: list[list[Layer]] = []
    for chunk, stage in zip(runner.stage.chunks, placement.stages_of(rank), strict=True):
        first = sum(sizes[:stage])
        layers.append([Layer(first + index, module) for index, module in enumerate(chunk)])  # type: ignore[arg-type]
    return layers


def stage_titles(runner: StepRunner) -> list[list[str]]:
    """Returns the titles of the layers of each stage of the model."""
    placement = runner.schedule.placement
    specs = rank_specs(runner.config, runner.architecture, placement)
    locations = [placement.location(stage) for stage in range(placement.stages)]
    return [[spec.title for spec in specs[at.rank][at.chunk]] for at in locations]


class Mark(NamedTuple):
    """A moment of a layer, in seconds of perf_counter.

    Attributes:
        event: `entered` and `left` in a forward; `gradient` of the layer's output in a backward.
        layer: its number in the model. The gradient of a layer's input counts as that of the layer
        before it. host: the time at which the host was there. device: the time at which the device
        was there; on CPUs the same.
    """

    event: str
    layer: int
    host: float
    device: float


class Marks:
    """Marks in the order in which the host makes them."""

    def __init__(self, device: torch.device) -> None:
        self.on_stream = device.type == "cuda"
        self._marks: list[tuple[str, int, float, Any]] = []
        if self.on_stream:
            self._anchor = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            self._anchor.record()
            torch.cuda.synchronize(device)
            self._anchor_time = time.perf_counter()

    def add(self, event: str, index: int) -> None:
        """Adds a mark at the current moment."""
        stream_event = None
        if self.on_stream:
            stream_event = torch.cuda.Event(enable_timing=True)
            stream_event.record()
        self._marks.append((event, index, time.perf_counter(), stream_event))

    def all(self) -> list[Mark]:
        """Returns all marks; on a GPU its work must be done."""
        return [
            Mark(event, index, host, host if at is None else self._device_time(at))
            for event, index, host, at in self._marks
        ]

    def _device_time(self, stream_event: Any) -> float:
        return self._anchor_time + self._anchor.elapsed_time(stream_event) / 1e3


@contextmanager
def layer_marks(chunks: list[list[Layer]], device: torch.device) -> Iterator[Marks]:
    """Puts hooks on the layers that make marks until the end of the block."""
    marks = Marks(device)

    def mark_gradient(tensor: Tensor, index: int) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: marks.add("gradient", index))

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(inputs[0], HiddenStates):
                mark_gradient(inputs[0].hidden, index - 1)
            marks.add("entered", index)

        return hook

    def after(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: HiddenStates | Tensor) -> None:
            marks.add("left", index)
            mark_gradient(output if isinstance(output, Tensor) else output.hidden, index)

        return hook

    # Only a chunk's first layer needs a mark at its start; others start where the last one ends.
    handles = [
        chunk[0].module.register_forward_pre_hook(before(chunk[0].number)) for chunk in chunks
    ]
    handles += [
        layer.module.register_forward_hook(after(layer.number))
        for chunk in chunks
        for layer in chunk
    ]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def traced_actions(
    records: list[ActionTiming], marks: list[Mark], offset: Offset, *, on_stream: bool
) -> list[TracedAction]:
    """Returns the actions in the time of rank 0, each with the seconds of its layers."""
    actions = []
    position = 0
    for record in records:
        inside: list[Mark] = []
        while position < len(marks) and marks[position].host <= record.end:
            inside.append(marks[position])
            position += 1
        # A message blocks the stream and not the host: the first layer's mark shows its arrival.
        ready = max(record.ready, inside[0].device) if on_stream and inside else record.ready
        shift = offset.seconds
        actions.append(
            TracedAction(
                record.action,
                record.start + shift,
                ready + shift,
                record.end + shift,
                _layer_seconds(inside),
            )
        )
    return actions


def _layer_seconds(marks: list[Mark]) -> dict[int, float]:
    """Returns the seconds between the marks of an action. A backward visits layers in reverse."""
    seconds = {}
    for first, second in pairwise(marks):
        if second.event == "left":
            seconds[second.layer] = second.device - first.device
        elif first.event == second.event == "gradient":
            seconds[first.layer] = second.device - first.device
    return seconds
