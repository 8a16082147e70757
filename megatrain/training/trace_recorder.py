"""Records when each action of some steps ran on this rank, and how long each of its layers took (`profile.steps`).

A layer's forward lasts from the end of the layer before it to its own end. Its backward lasts from the moment its output's
gradient is there to the moment its input's is. The marks are one forward hook and one gradient hook a layer, which only
exist during a traced step; what a layer does in a deferred W is not told apart. On a GPU the marks are events on the stream,
which also tell how long the stream waited for a message: the host does not wait there.

Ranks of one machine share a clock (perf_counter is the machine's time since its start). One rank of each other machine
asks rank 0 for the time before each traced step; the answer of the fastest of several exchanges is off by at most half of
what that exchange took.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config.loader import to_dict
from megatrain.distributed import device as device_module
from megatrain.distributed.collectives import broadcast_object, gather_objects
from megatrain.distributed.mesh import MeshAxis
from megatrain.models.transformer import HiddenStates
from megatrain.pipeline.executor import ActionTiming
from megatrain.pipeline.stage_builder import rank_specs
from megatrain.telemetry.trace_format import RankTrace, TracedAction, write_trace
from megatrain.training.step_runner import StepRunner

logger = logging.getLogger("megatrain")

EXCHANGES = 16


class Tracer:
    """Traces the steps of `config.profile.steps` into the run's folder. All ranks make it and call it together.

    With `keep`, which takes each of this rank's traces, nothing is written; the steps may then be others.
    """

    def __init__(
        self,
        runner: StepRunner,
        run_folder: Path,
        *,
        steps: range | None = None,
        keep: Callable[[RankTrace], Any] | None = None,
    ) -> None:
        self.runner, self.run_folder, self.keep = runner, run_folder, keep
        told = runner.config.profile.steps
        self.steps = (
            steps
            if steps is not None
            else range(0)
            if told is None
            else range(told[0], told[1] + 1)
        )
        if self.steps:
            self.run = broadcast_object(time.time(), runner.mesh.world)
            self.clock = SharedClock(runner.mesh.world)

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Trace what is done inside, if this is one of the steps to trace."""
        if step not in self.steps:
            yield
            return
        executor = self.runner.executor
        offset = self.clock.offset()
        device_module.reset_peak_memory(self.runner.device)
        executor.action_timings = []
        try:
            with layer_marks(own_layers(self.runner), self.runner.device) as marks:
                started = time.perf_counter()
                yield
                seconds = time.perf_counter() - started
            actions = traced_actions(
                executor.action_timings, marks.all(), offset, on_stream=marks.on_stream
            )
        finally:
            executor.action_timings = None
        if self.keep is not None:
            self.keep(self._trace(step, seconds, actions, offset))
            return
        try:
            write_trace(self.run_folder, self._trace(step, seconds, actions, offset))
        except OSError as error:  # the run is worth more than its trace
            logger.warning(f"the trace of step {step} cannot be written: {error}")
        if step == self.steps[-1] and self.runner.mesh.rank == 0:
            logger.info(f"traced to step {step}; `megatrain profile {self.run_folder}` shows it")

    def _trace(
        self, step: int, seconds: float, actions: list[TracedAction], offset: Offset
    ) -> RankTrace:
        runner, mesh = self.runner, self.runner.mesh
        memory = device_module.peak_memory(runner.device)
        return RankTrace(
            run=self.run,
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


# -- layers ------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer of this rank and its place in the whole model's list."""

    place: int
    module: nn.Module


def own_layers(runner: StepRunner) -> list[list[Layer]]:
    """This rank's layers by chunk, with their places in the model."""
    placement, rank = runner.schedule.placement, runner.mesh.pipeline.rank
    places: list[list[Layer]] = []
    sizes = [len(stage) for stage in stage_titles(runner)]
    for chunk, stage in zip(runner.stage.chunks, placement.stages_of(rank), strict=True):
        first = sum(sizes[:stage])
        places.append([Layer(first + index, module) for index, module in enumerate(chunk)])  # type: ignore[arg-type]
    return places


def stage_titles(runner: StepRunner) -> list[list[str]]:
    """Of the layers, by stage of the model."""
    placement = runner.schedule.placement
    specs = rank_specs(runner.config, runner.architecture, placement)
    places = [placement.location(stage) for stage in range(placement.stages)]
    return [[spec.title for spec in specs[place.rank][place.chunk]] for place in places]


class Mark(NamedTuple):
    """A moment of one layer: `entered` and `left` in a forward, `gradient` of its output in a backward; perf_counter seconds."""

    what: str
    place: int
    """Of the layer. The gradient of a layer's input counts as that of the output of the place before it."""
    host: float
    """When the host was there."""
    moment: float
    """When the device was there; on CPUs the same."""


class Marks:
    """Marks in the order in which the host makes them."""

    def __init__(self, device: torch.device) -> None:
        self.on_stream = device.type == "cuda"
        self._made: list[tuple[str, int, float, Any]] = []
        if self.on_stream:
            self._anchor = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            self._anchor.record()
            torch.cuda.synchronize(device)
            self._anchored = time.perf_counter()

    def add(self, what: str, place: int) -> None:
        event = None
        if self.on_stream:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._made.append((what, place, time.perf_counter(), event))

    def all(self) -> list[Mark]:
        """All marks; on a GPU once it has done its work."""
        return [
            Mark(
                what,
                place,
                host,
                host if event is None else self._anchored + self._anchor.elapsed_time(event) / 1e3,
            )
            for what, place, host, event in self._made
        ]


@contextmanager
def layer_marks(chunks: list[list[Layer]], device: torch.device) -> Iterator[Marks]:
    """Hooks on the layers that make marks until the end of the block."""
    marks = Marks(device)

    def await_gradient(tensor: Tensor, place: int) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: marks.add("gradient", place))

    def before(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(inputs[0], HiddenStates):
                await_gradient(inputs[0].hidden, place - 1)
            marks.add("entered", place)

        return hook

    def after(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: HiddenStates | Tensor) -> None:
            marks.add("left", place)
            await_gradient(output if isinstance(output, Tensor) else output.hidden, place)

        return hook

    # Of a chunk's first layer the beginning is marked too; any other begins where the one before it ends.
    handles = [
        chunk[0].module.register_forward_pre_hook(before(chunk[0].place)) for chunk in chunks
    ]
    handles += [
        layer.module.register_forward_hook(after(layer.place))
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
    """The records on rank 0's clock, each with its layers' seconds."""
    actions = []
    position = 0
    for record in records:
        inside: list[Mark] = []
        while position < len(marks) and marks[position].host <= record.end:
            inside.append(marks[position])
            position += 1
        # A message holds up the stream and not the host, so the first layer's mark says when the message was there.
        ready = max(record.ready, inside[0].moment) if on_stream and inside else record.ready
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
    """What lies between the marks of one action. A backward's go through the layers in reverse."""
    seconds = {}
    for first, second in pairwise(marks):
        if second.what == "left":
            seconds[second.place] = second.moment - first.moment
        elif first.what == second.what == "gradient":
            seconds[first.place] = second.moment - first.moment
    return seconds


# -- clocks ------------------------------------------------------------------------------------------------------------


class Offset(NamedTuple):
    """What to add to this rank's clock to read rank 0's, and by how much that may be wrong at most; seconds."""

    seconds: float
    error: float


class SharedClock:
    """Reads rank 0's perf_counter on any rank. Made and used by all ranks together.

    Attributes:
        asking: the first rank of each machine, rank 0 first.
    """

    def __init__(self, world: MeshAxis, machine: str | None = None) -> None:
        self.rank, self.world = world.rank, world
        self.machines = gather_objects(machine or machine_name(), world)
        self.asking = sorted(
            {name: rank for rank, name in reversed(list(enumerate(self.machines)))}.values()
        )
        # Messages between CPUs, whatever the run's own groups are made for.
        with world.activity.collective("making a group of the", world):
            self.group = (
                dist.new_group(self.asking, backend="gloo") if len(self.asking) > 1 else None
            )

    def offset(self) -> Offset:
        """The same on all ranks of a machine."""
        mine = Offset(0.0, 0.0)
        if self.rank in self.asking and self.group is not None:
            mine = self._answer() if self.rank == 0 else self._ask()
            self.world.activity.set("comparing clocks")
        if self.group is None:
            return mine
        return gather_objects(mine, self.world)[self.machines.index(self.machines[self.rank])]

    def _answer(self) -> Offset:
        """Rank 0 tells each asking rank in turn what its clock says."""
        for peer in self.asking[1:]:
            self.world.activity.set_waiting_for("its question after the time", peer)
            for _ in range(EXCHANGES):
                dist.recv(torch.empty(1, dtype=torch.float64), peer, group=self.group)
                dist.send(
                    torch.tensor([time.perf_counter()], dtype=torch.float64), peer, group=self.group
                )
        return Offset(0.0, 0.0)

    def _ask(self) -> Offset:
        best = Offset(0.0, float("inf"))
        self.world.activity.set_waiting_for("the time", 0)
        for _ in range(EXCHANGES):
            answer = torch.zeros(1, dtype=torch.float64)
            asked = time.perf_counter()
            dist.send(answer, 0, group=self.group)
            dist.recv(answer, 0, group=self.group)
            answered = time.perf_counter()
            if (answered - asked) / 2 < best.error:
                best = Offset(float(answer) - (asked + answered) / 2, (answered - asked) / 2)
        return best


def machine_name() -> str:
    """Equal for processes that share a clock: the kernel's name for this start of the machine."""
    path = Path("/proc/sys/kernel/random/boot_id")
    if path.exists():
        return path.read_text(encoding="ascii").strip()
    import socket

    return socket.gethostname()
