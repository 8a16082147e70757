"""Contenders of benchmarks/pipeline.py: functions that run one step on a rank."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline_ranks import RunStep

if TYPE_CHECKING:
    from megatrain.pipeline.executor import ActionTiming
    from megatrain.pipeline.p2p import P2PCommunicator
    from megatrain.pipeline.schedule import Schedule

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


BLOCKS = 16


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


NARROW_MODEL = {
    **MODEL,
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
}


def make_settled(
    rank: int, ranks: int, seconds: list[float], microbatches: int, folder: str
) -> dict[str, RunStep]:
    """Makes 1f1b and the schedule of auto; `description` returns the reason of the choice."""
    import json

    import torch

    from megatrain.config import loader as configuration
    from megatrain.data.dataloader import Batch
    from megatrain.distributed.mesh import make_mesh
    from megatrain.models.config import load_hf_config, read_config
    from megatrain.training.autotune import resolve_schedule
    from megatrain.training.step_runner import StepRunner

    sleeping_blocks(seconds)
    architecture, mesh = read_config(load_hf_config(NARROW_MODEL)), make_mesh(rank, pipeline=ranks)
    rows = torch.randint(0, 64, (microbatches, 1, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(8).expand(1, -1)
    batches = [
        Batch(row[:, :-1], row[:, 1:], positions, torch.zeros_like(positions)) for row in rows
    ]

    def contender(name: str) -> RunStep:
        raw = real_config(name, microbatches) | {
            "model": NARROW_MODEL,
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
