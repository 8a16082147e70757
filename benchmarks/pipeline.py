"""Compares the executor with the simulator and with DeepSpeed's PipelineEngine.

    python benchmarks/pipeline.py sleep     4 ranks whose compute sleeps: bubbles, throughputs
    python benchmarks/pipeline.py real      2 ranks x 1 thread of a real model: bubbles
    python benchmarks/pipeline.py auto      4 ranks whose blocks sleep: auto against 1f1b
    python benchmarks/pipeline.py overhead  cost of an action besides its compute

Contenders share the ranks and take turns, a lap each, so that noise of the machine affects all. Each
figure is the median over laps; ratios are medians of the ratios of laps. A bubble is the idle share of
ranks x makespan: a rank is busy while an action computes, not while it waits for its input.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline_ranks import Ranks, RunStep, race

if TYPE_CHECKING:
    from megatrain.pipeline.executor import ActionTiming
    from megatrain.pipeline.p2p import P2PCommunicator
    from megatrain.pipeline.schedule import Action, Schedule
    from megatrain.pipeline.simulator import Timeline, Times

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipev")
BASE = "1f1b"
MODEL = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
}
WIDTH = 16
"""Width of hidden tensors where compute sleeps or is negligible."""

# -- bubbles -------------------------------------------------------------------------------------


def makespan(lap: list[list[ActionTiming]]) -> float:
    """Returns the seconds from the first start to the last end; ranks share the machine's clock."""
    return max(records[-1].end for records in lap) - min(records[0].start for records in lap)


def bubble(lap: list[list[ActionTiming]]) -> float:
    """Returns the idle share of ranks x makespan."""
    busy = sum(record.end - record.ready for records in lap for record in records)
    return 1 - busy / (len(lap) * makespan(lap))


def measured_times(schedule: Schedule, lap: list[list[ActionTiming]]) -> Times:
    """Returns the mean times of each stage's actions in this lap; B counts as an input gradient."""
    from megatrain.pipeline.simulator import Times

    spent: dict[tuple[str, int], list[float]] = {}
    for rank, records in enumerate(lap):
        for record in records:
            stage = schedule.placement.stage(rank, record.action.chunk)
            spent.setdefault((record.action.kind, stage), []).append(record.end - record.ready)
    mean = {key: statistics.fmean(seconds) for key, seconds in spent.items()}
    stages = range(schedule.placement.stages)
    input_gradient = [mean["I", s] if ("I", s) in mean else mean["B", s] for s in stages]
    return Times(
        [mean["F", s] for s in stages], input_gradient, [mean.get(("W", s), 0.0) for s in stages]
    )


def own_times(schedule: Schedule, lap: list[list[ActionTiming]]) -> Times:
    """Returns the measured time of each action; the difference to the simulation is added waiting."""
    from megatrain.pipeline.simulator import Times

    spent = {
        (schedule.placement.stage(rank, record.action.chunk), record.action): record.end
        - record.ready
        for rank, records in enumerate(lap)
        for record in records
    }

    class OwnTimes(Times):
        def duration(self, action: Action, stage: int) -> float:
            return spent[stage, action]

    return OwnTimes([], [], [])


class Row(NamedTuple):
    """Bubbles of a schedule's laps, measured and simulated, and makespans in seconds."""

    measured: list[float]
    simulated: list[float]
    spans: list[float]
    ideal_span: float | None = None
    replayed: list[float] | None = None
    """Simulated with each action's own time."""


def print_bubbles(rows: dict[str, Row]) -> None:
    base = rows[BASE]
    print(
        f"{'':14}{'bubble':>9}{'simulated':>11}{'points off':>12}{'own times':>11}{'makespan ms':>13}{'x 1f1b':>9}{'simulated':>11}"
    )
    for name, row in rows.items():
        off = statistics.median(
            100 * (a - b) for a, b in zip(row.measured, row.simulated, strict=True)
        )
        replayed = f"{statistics.median(row.replayed):.1%}" if row.replayed else "-"
        ratio = statistics.median(a / b for a, b in zip(base.spans, row.spans, strict=True))
        ideal = (
            f"{base.ideal_span / row.ideal_span:.3f}" if base.ideal_span and row.ideal_span else "-"
        )
        print(
            f"{name:14}{statistics.median(row.measured):>9.1%}{statistics.median(row.simulated):>11.1%}{off:>+12.2f}{replayed:>11}"
            f"{1e3 * statistics.median(row.spans):>13.1f}{ratio:>9.3f}{ideal:>11}"
        )


# -- compute that sleeps -------------------------------------------------------------------------


def sleeping_stage(seconds: float) -> Any:
    """Returns a stage whose forward, input gradient and weight gradient sleep `seconds` each."""
    import torch

    from megatrain.distributed.tensor_parallel import linear
    from megatrain.models.transformer import HiddenStates

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds)
            return grad

    class Buffer:
        """Buffer to which a linear layer adds its weight's gradient."""

        dtype = torch.float32

        def addmm_(self, grad: torch.Tensor, x: torch.Tensor) -> None:
            time.sleep(seconds)

    class Stage:
        def __init__(self, last: int | None) -> None:
            self.last = last
            self.weight = torch.nn.Parameter(torch.eye(WIDTH))
            self.weight.main_grad = Buffer()  # type: ignore[attr-defined]

        def __call__(
            self, hidden_states: HiddenStates | None, microbatch: Any, chunk: int
        ) -> HiddenStates | torch.Tensor:
            x = (
                torch.ones(1, WIDTH, requires_grad=True)
                if hidden_states is None
                else hidden_states.hidden
            )
            y = linear(Sleep.apply(x), self.weight)
            return y.sum() if chunk == self.last else HiddenStates(y)

    return Stage


def chunk_with_loss(schedule: Schedule, rank: int) -> int | None:
    """Returns the rank's chunk that is the model's last stage, or None."""
    end = schedule.placement.location(schedule.placement.stages - 1)
    return end.chunk if end.rank == rank else None


def executor_lap(
    schedule: Schedule, rank: int, stage: Any, channels: P2PCommunicator
) -> Callable[[list[ActionTiming] | None], None]:
    """Returns a step of the schedule with tensors [1, WIDTH] that appends its timings to a list."""
    import torch

    from megatrain.pipeline.communication import add_communication
    from megatrain.pipeline.executor import Executor
    from megatrain.pipeline.verify import check_schedule

    microbatches = 1 + max(action.microbatch for action in schedule.actions[rank])
    check_schedule(schedule, microbatches)
    instructions = add_communication(schedule)[rank]
    executor = Executor(
        stage,
        communicator=channels,
        hidden_shape=(1, WIDTH),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )

    def backward(output: torch.Tensor, grad: torch.Tensor, *, last: bool) -> None:
        torch.autograd.backward(output, grad)

    def lap(records: list[ActionTiming] | None) -> None:
        executor.action_timings = records
        executor.run(
            instructions, [None] * microbatches, backward=backward, loss_weight=torch.ones(())
        )  # type: ignore[list-item]

    return lap


def recorded(lap: Callable[[list[ActionTiming]], None]) -> list[ActionTiming]:
    records: list[ActionTiming] = []
    lap(records)
    return records


def make_sleepers(rank: int, ranks: int, part: float, microbatches: int) -> dict[str, RunStep]:
    from megatrain.distributed.mesh import MeshAxis
    from megatrain.pipeline.p2p import P2PCommunicator
    from megatrain.pipeline.schedules import build_schedule

    channels = P2PCommunicator(MeshAxis(rank, ranks, tuple(range(ranks))), ring=True)
    laps: dict[str, RunStep] = {}
    for name in SCHEDULES:
        schedule = build_schedule(name, ranks, microbatches)
        stage = sleeping_stage(part / schedule.placement.chunks)(chunk_with_loss(schedule, rank))
        laps[name] = functools.partial(recorded, executor_lap(schedule, rank, stage, channels))
    return laps


def simulated(name: str, ranks: int, microbatches: int, part: float) -> Timeline:
    """Simulates a schedule with `part` seconds per rank for each of F, I and W."""
    from megatrain.pipeline.schedules import build_schedule
    from megatrain.pipeline.simulator import even_times, simulate

    schedule = build_schedule(name, ranks, microbatches)
    return simulate(
        schedule,
        even_times(schedule.placement, forward=part, input_gradient=part, weight_gradient=part),
    )


def sleep(args: argparse.Namespace) -> None:
    part = args.part / 1e3
    ranks = Ranks(args.ranks, make_sleepers, part=part, microbatches=args.microbatches)
    rows = {}
    for name, laps in race(ranks, list(SCHEDULES), args.laps).items():
        ideal = simulated(name, args.ranks, args.microbatches, part)
        rows[name] = Row(
            [bubble(lap) for lap in laps],
            [ideal.bubble] * len(laps),
            [makespan(lap) for lap in laps],
            ideal.makespan,
        )
    print(
        f"{args.ranks} ranks, {args.microbatches} microbatches, "
        f"forward = input = weight gradient = {args.part:g} ms a rank, asleep"
    )
    print_bubbles(rows)


# -- a real model --------------------------------------------------------------------------------


def real_config(name: str, microbatches: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "parallel": {"pipeline": 2, "schedule": name},
        "data": {"sequence_length": MODEL["max_position_embeddings"]},
        "train": {"steps": 10**6, "micro_batch_size": 2, "global_batch_size": 2 * microbatches},
        "lr_schedule": {"name": "constant"},
        "optimizer": {"grad_clip": 1.0, "lr": 1e-4},
    }


def make_runners(rank: int, ranks: int, microbatches: int) -> dict[str, RunStep]:
    import torch

    from megatrain.config import loader as configuration
    from megatrain.data.dataloader import Batch
    from megatrain.distributed.mesh import make_mesh
    from megatrain.models.config import load_hf_config, read_config
    from megatrain.training.step_runner import StepRunner

    length: int = MODEL["max_position_embeddings"]  # type: ignore[assignment]
    architecture = read_config(load_hf_config(MODEL))
    positions = torch.arange(length).expand(2, -1)
    rows = torch.randint(
        0, 1024, (microbatches, 2, length + 1), generator=torch.Generator().manual_seed(0)
    )
    batches = [
        Batch(row[:, :-1], row[:, 1:], positions, torch.zeros_like(positions)) for row in rows
    ]

    def contender(name: str) -> RunStep:
        config = configuration.from_dict(real_config(name, microbatches))
        runner = StepRunner(
            config, architecture, make_mesh(rank, pipeline=ranks), torch.device("cpu")
        )
        steps = iter(range(1, 10**6))

        def lap(records: list[ActionTiming]) -> None:
            runner.executor.action_timings = records
            runner.train_step(next(steps), batches)

        return functools.partial(recorded, lap)

    return {name: contender(name) for name in SCHEDULES}


def real(args: argparse.Namespace) -> None:
    from megatrain.pipeline.schedules import build_schedule
    from megatrain.pipeline.simulator import simulate

    ranks = Ranks(2, make_runners, microbatches=args.microbatches)
    rows = {}
    for name, laps in race(ranks, list(SCHEDULES), args.laps).items():
        schedule = build_schedule(name, 2, args.microbatches)
        by_mean, by_own = (
            [simulate(schedule, times(schedule, lap)).bubble for lap in laps]
            for times in (measured_times, own_times)
        )
        rows[name] = Row(
            [bubble(lap) for lap in laps], by_mean, [makespan(lap) for lap in laps], replayed=by_own
        )
    print(
        f"2 ranks x 1 thread, {args.microbatches} microbatches; simulated from each lap's mean times by stage and kind of action,"
    )
    print("and from each action's own time: the rest is what the executor and the messages add")
    print_bubbles(rows)


# -- what auto settles on ------------------------------------------------------------------------

BLOCKS = 16
SLOW_BLOCKS = {5: 3.0, 6: 3.0}
"""Slow blocks of the uneven model, with their time relative to the others."""


def sleeping_blocks(seconds: list[float]) -> Any:
    """Patches blocks so that F, I and W of block k sleep seconds[k] each."""
    from contextlib import ExitStack
    from unittest.mock import patch

    import torch

    from megatrain.distributed import tensor_parallel
    from megatrain.models.transformer import Block

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
            ctx.seconds = seconds
            time.sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            time.sleep(ctx.seconds)
            return grad, None

    make, compute, weight_gradient = Block.__init__, Block._compute, tensor_parallel.weight_gradient

    def numbered(block: Any, parts: Any, layer: int, **arguments: Any) -> None:
        make(block, parts, layer, **arguments)
        block.seconds = seconds[layer]
        next(weight for weight in block.parameters() if weight.dim() == 2).seconds = seconds[layer]

    def slowly(block: Any, x: torch.Tensor, microbatch: Any) -> torch.Tensor:
        return Sleep.apply(compute(block, x, microbatch), block.seconds)

    def slow_gradient(weight: Any, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
        time.sleep(getattr(weight, "seconds", 0.0))
        return weight_gradient(weight, x, grad)

    stack = ExitStack()
    for target, name, new in (
        (Block, "__init__", numbered),
        (Block, "_compute", slowly),
        (tensor_parallel, "weight_gradient", slow_gradient),
    ):
        stack.enter_context(patch.object(target, name, new))
    return stack


def make_settled(
    rank: int, ranks: int, seconds: list[float], microbatches: int, folder: str
) -> dict[str, RunStep]:
    """Makes 1f1b and the schedule of auto; `description` returns auto's description of its choice."""
    import json

    import torch

    from megatrain.config import loader as configuration
    from megatrain.data.dataloader import Batch
    from megatrain.distributed.mesh import make_mesh
    from megatrain.models.config import load_hf_config, read_config
    from megatrain.training.autotune import resolve_schedule
    from megatrain.training.step_runner import StepRunner

    sleeping_blocks(seconds)
    model = {
        **MODEL,
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8,
    }
    architecture, mesh = read_config(load_hf_config(model)), make_mesh(rank, pipeline=ranks)
    rows = torch.randint(0, 64, (microbatches, 1, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(8).expand(1, -1)
    batches = [
        Batch(row[:, :-1], row[:, 1:], positions, torch.zeros_like(positions)) for row in rows
    ]

    def contender(name: str) -> RunStep:
        raw = real_config(name, microbatches) | {
            "model": model,
            "run": {"output_dir": folder},
            "data": {"sequence_length": 8},
        }
        raw["parallel"]["pipeline"] = ranks
        raw["train"] |= {"micro_batch_size": 1, "global_batch_size": microbatches}
        settled = resolve_schedule(
            configuration.from_dict(raw),
            architecture,
            mesh,
            torch.device("cpu"),
            batches=lambda: batches,
        )
        runner = StepRunner(
            settled.config,
            architecture,
            mesh,
            torch.device("cpu"),
            schedule=settled.schedule,
            channels=settled.channels,
        )
        steps = iter(range(1, 10**6))

        def lap(records: list[ActionTiming]) -> None:
            runner.executor.action_timings = records
            runner.train_step(next(steps), batches)

        return functools.partial(recorded, lap)

    def description() -> str:
        with open(os.path.join(folder, "autotuned_schedule.json"), encoding="utf-8") as file:
            return json.load(file)["reason"]

    return {name: contender(name) for name in (BASE, "auto")} | {"description": description}


def auto(args: argparse.Namespace) -> None:
    for title, slow in (("even", {}), ("uneven", SLOW_BLOCKS)):
        seconds = [
            args.part / 1e3 * args.ranks / BLOCKS * slow.get(block, 1.0) for block in range(BLOCKS)
        ]
        with tempfile.TemporaryDirectory() as folder:
            ranks = Ranks(
                args.ranks,
                make_settled,
                seconds=seconds,
                microbatches=args.microbatches,
                folder=folder,
            )
            description = ranks.lap("description")[0]
            laps = race(ranks, [BASE, "auto"], args.laps)
        spans = {name: [makespan(lap) for lap in of_name] for name, of_name in laps.items()}
        ratio = statistics.median(a / b for a, b in zip(spans[BASE], spans["auto"], strict=True))
        print(
            f"{title} blocks, {args.ranks} ranks, {args.microbatches} microbatches, {args.part:g} ms a rank in the mean for each of F, I and W, asleep"
        )
        for name, of_name in laps.items():
            print(
                f"  {name:8}{1e3 * statistics.median(spans[name]):>8.1f} ms, bubble {statistics.median(map(bubble, of_name)):.1%}"
            )
        print(f"  auto is {ratio:.3f} x 1f1b; it chose {description}")


# -- what an action costs ------------------------------------------------------------------------


def make_tiny(rank: int, ranks: int, microbatches: int, steps: int) -> dict[str, RunStep]:
    """Makes contenders whose stages are one linear layer [1, WIDTH], and `bare` without any engine.

    A lap returns the seconds of one step, without gradient reduction and optimizer.
    """
    import torch
    import torch.distributed as dist

    from megatrain.distributed.mesh import MeshAxis
    from megatrain.models.transformer import HiddenStates
    from megatrain.pipeline.p2p import P2PCommunicator
    from megatrain.pipeline.schedules import build_schedule

    def timed(step: Callable[[], None]) -> RunStep:
        def lap() -> float:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            return (time.perf_counter() - start) / steps

        return lap

    channels = P2PCommunicator(MeshAxis(rank, ranks, tuple(range(ranks))), ring=True)
    layer = torch.nn.Linear(WIDTH, WIDTH)

    def ours(name: str) -> RunStep:
        schedule = build_schedule(name, ranks, microbatches)
        loss_chunk = chunk_with_loss(schedule, rank)

        def stage(
            hidden_states: HiddenStates | None, microbatch: Any, chunk: int
        ) -> HiddenStates | torch.Tensor:
            y = layer(given if hidden_states is None else hidden_states.hidden)
            return y.sum() if chunk == loss_chunk else HiddenStates(y)

        step = executor_lap(schedule, rank, stage, channels)
        return timed(lambda: step(None))

    given = torch.ones(1, WIDTH)

    def bare() -> None:
        for _ in range(microbatches):
            x = torch.ones(1, WIDTH, requires_grad=rank > 0)
            y = layer(x)
            torch.autograd.backward(y, given)

    return {
        "bare": timed(bare),
        "PipelineEngine": timed(pipeline_engine(ranks, microbatches)),
        **{name: ours(name) for name in SCHEDULES},
    }


def pipeline_engine(ranks: int, microbatches: int) -> Callable[[], None]:
    """Returns a step of DeepSpeed's engine: 1F1B without gradient reduction and optimizer."""
    import itertools

    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe import schedule as instructions

    class Passes(instructions.TrainSchedule):  # type: ignore[misc]
        def steps(self) -> Any:
            left_out = (
                instructions.ReduceTiedGrads,
                instructions.ReduceGrads,
                instructions.OptimizerStep,
            )
            for commands in super().steps():
                yield [command for command in commands if not isinstance(command, left_out)]

    deepspeed.init_distributed("gloo", dist_init_required=False)
    module = PipelineModule(
        layers=[torch.nn.Linear(WIDTH, WIDTH) for _ in range(ranks)],
        num_stages=ranks,
        partition_method="uniform",
        loss_fn=lambda output, label: output.sum(),
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": microbatches,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.0), config=settings
    )
    batch = (torch.ones(1, WIDTH), torch.zeros(1))
    engine.train_batch(itertools.repeat(batch))
    engine.set_dataiterator(itertools.repeat(batch))

    def step() -> None:
        engine._exec_schedule(
            Passes(micro_batches=microbatches, stages=ranks, stage_id=engine.stage_id)
        )

    return step


def overhead(args: argparse.Namespace) -> None:
    from megatrain.pipeline.schedules import build_schedule

    ranks = Ranks(args.ranks, make_tiny, microbatches=args.microbatches, steps=args.steps)
    names = ["bare", "PipelineEngine", *SCHEDULES]
    seconds = {
        name: [max(lap) for lap in laps] for name, laps in race(ranks, names, args.laps).items()
    }
    counts = {
        name: len(build_schedule(name, args.ranks, args.microbatches).actions[0])
        for name in SCHEDULES
    }
    counts |= {"bare": 2 * args.microbatches, "PipelineEngine": 2 * args.microbatches}
    print(
        f"{args.ranks} ranks x 1 thread, {args.microbatches} microbatches, a linear layer of {WIDTH} a stage; time of a step / its actions"
    )
    print(
        f"{'':16}{'actions':>8}{'us an action':>14}{'x PipelineEngine':>18}{'less bare, us':>15}{'x PipelineEngine':>18}"
    )

    def each(name: str) -> list[float]:
        return [1e6 * second / counts[name] for second in seconds[name]]

    def less_bare(name: str) -> list[float]:
        """Returns microseconds per action minus those of the bare layer, which runs once per chunk."""
        chunks = (
            build_schedule(name, args.ranks, args.microbatches).placement.chunks
            if name in SCHEDULES
            else 1
        )
        return [
            1e6 * (a - chunks * b) / counts[name]
            for a, b in zip(seconds[name], seconds["bare"], strict=True)
        ]

    for name in names:
        whole = statistics.median(
            a / b for a, b in zip(each(name), each("PipelineEngine"), strict=True)
        )
        alone = statistics.median(
            a / b for a, b in zip(less_bare(name), less_bare("PipelineEngine"), strict=True)
        )
        net = "-" if name == "bare" else f"{statistics.median(less_bare(name)):.0f}"
        share = "-" if name == "bare" else f"{alone:.2f}"
        print(
            f"{name:16}{counts[name]:>8}{statistics.median(each(name)):>14.0f}{whole:>18.2f}{net:>15}{share:>18}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["sleep", "real", "auto", "overhead"])
    parser.add_argument(
        "--ranks", type=int, help="4 for sleep and auto, 2 for overhead unless given; real has 2"
    )
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument(
        "--part",
        type=float,
        default=30.0,
        help="sleep and auto: milliseconds of a forward, of an input and of a weight gradient",
    )
    parser.add_argument("--steps", type=int, default=10, help="overhead: steps of a lap")
    parser.add_argument("--laps", type=int, help="7, for overhead 30, unless given")
    args = parser.parse_args()
    args.ranks = args.ranks or {"sleep": 4, "real": 2, "auto": 4, "overhead": 2}[args.what]
    args.laps = args.laps or {"sleep": 7, "real": 7, "auto": 7, "overhead": 30}[args.what]
    {"sleep": sleep, "real": real, "auto": auto, "overhead": overhead}[args.what](args)


if __name__ == "__main__":
    main()
