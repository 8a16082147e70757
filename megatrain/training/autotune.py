"""`parallel.schedule: auto`: settles schedule, placement and cut of the layers before the first step.

1. The real stages are measured under 1F1B (calibrate.py), and what else they could do is simulated (pipeline/plans.py).
2. The most promising plans are measured too, as whole steps. One is taken only if it really is faster than 1F1B.
3. The run is built as if its config had said so: `config.yaml` in its folder names schedule and layers_per_stage.

Rank 0 decides for all. What it chose is kept in the run's folder, so that a run that was killed goes on with the same cut and
schedule, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.distributed import device as device_module
from megatrain.distributed.collectives import all_reduce, broadcast_object
from megatrain.distributed.mesh import MeshAxis, ProcessMesh
from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig
from megatrain.models.counts import layer_costs
from megatrain.pipeline.p2p import P2PCommunicator
from megatrain.pipeline.partition import blocks_per_stage, cut_layers
from megatrain.pipeline.registry import make_schedule
from megatrain.pipeline.schedule import Schedule
from megatrain.pipeline.schedule_csv import write_schedule
from megatrain.pipeline.schedules import SCHEDULES
from megatrain.pipeline.stage_builder import run_schedule
from megatrain.planner.schedule_search import ScheduleCandidate, candidate_of, find_candidates
from megatrain.training.calibrate import ScheduleProfiler

logger = logging.getLogger("megatrain")

WORTH_IT = 0.02
"""The least share of a step's time to leave 1F1B for: what a plan must promise, and half of it what it must keep."""
TRIALS = 3
"""Plans to measure at most."""
AS_SAID = 0.05
"""A plan that takes as long as it promised, but for this share, ends the trials."""
OF_FREE = 0.8
"""The share of a rank's free memory that may be planned with; the rest is for what nobody counts."""
CHOICE, ACTIONS = "schedule.json", "schedule.csv"


class ResolvedSchedule(NamedTuple):
    """A run whose schedule is settled."""

    config: Config
    schedule: Schedule | None = None
    """None where the config names it."""
    channels: P2PCommunicator | None = None
    """Made already; None where there are none."""


class _Choice(NamedTuple):
    """A plan and why it was taken."""

    schedule: Schedule
    counts: list[int]
    words: str


def resolve_schedule(
    config: Config,
    architecture: TransformerConfig,
    mesh: ProcessMesh,
    device: torch.device,
    *,
    batches: Callable[[], Sequence[Batch]],
    resumed: bool = False,
    ranks_here: int = 1,
) -> ResolvedSchedule:
    """The config with auto replaced by what it chose; any other config as it is. All ranks call it together.

    Args:
        batches: gives microbatches to measure with, such as the first step's.
        resumed: whether the run goes on from a checkpoint: then what it chose before counts, if it still fits.
        ranks_here: on this machine, which share its memory.
    """
    if config.parallel.schedule != "auto":
        return ResolvedSchedule(config)
    if mesh.pipeline.size == 1:
        return ResolvedSchedule(_replaced(config, schedule="1f1b"))
    asked = _asked(config, architecture, mesh)
    choice = broadcast_object(
        _read(config, asked) if resumed and mesh.rank == 0 else None, mesh.world
    )
    channels = None
    if choice is None:
        calibration = ScheduleProfiler(config, architecture, mesh, device, batches())
        choice, channels = (
            _measure(calibration, _limit(config, mesh.world, device, ranks_here)),
            calibration.channels,
        )
        if mesh.rank == 0:
            _write(config, asked, choice)
    if mesh.rank == 0:
        logger.info(f"  schedule auto: {choice.words}")
    return ResolvedSchedule(
        _config_of(config, choice.schedule, choice.counts), choice.schedule, channels
    )


# -- the choice --------------------------------------------------------------------------------------------------------


def _measure(calibration: ScheduleProfiler, limit: float) -> _Choice:
    """Measured, simulated, tried; the same on all ranks."""
    config, mesh = calibration.config, calibration.mesh
    schedule = run_schedule(config, mesh.data.size)
    counts = blocks_per_stage(
        cut_layers(
            layer_costs(calibration.architecture, config.data.sequence_length), mesh.pipeline.size
        )
    )
    costs, seconds = calibration.base(_config_of(config, schedule, counts), schedule)
    search: tuple[ScheduleCandidate, list[ScheduleCandidate]] | None = None
    if costs is not None:
        mesh.activity.set_phase("choosing a schedule")
        search = (
            candidate_of(costs, schedule, tuple(counts)),
            find_candidates(
                costs, ranks=mesh.pipeline.size, microbatches=len(calibration.batches), limit=limit
            ),
        )
    search = broadcast_object(search, mesh.world)
    assert search is not None, "made on rank 0"
    base, plans = search
    fits = max(base.memory) <= limit or config.parallel.autotune_memory_gib is None
    if not fits and not plans:
        raise ConfigError(
            "parallel.autotune_memory_gib",
            config.parallel.autotune_memory_gib,
            "is less than any schedule takes on its fullest rank",
            f"1f1b takes {max(base.memory) / 2**30:.3g}; use more pipeline ranks, a smaller train.micro_batch_size or recomputation",
        )
    tried = _try(
        calibration,
        _promising(base, plans, seconds) if fits else plans[:TRIALS],
        base,
        seconds if fits else math.inf,
    )
    plan, measured = min(tried, key=lambda trial: trial[1], default=(base, seconds))
    if fits and measured > (1 - WORTH_IT / 2) * seconds:
        return _Choice(base.schedule, list(base.counts), _stays(base, seconds, plans, tried))
    return _Choice(plan.schedule, list(plan.counts), _changes(plan, measured, base, seconds, limit))


def _promising(
    base: ScheduleCandidate, plans: list[ScheduleCandidate], seconds: float
) -> list[ScheduleCandidate]:
    return [plan for plan in plans if _expected(plan, base, seconds) <= (1 - WORTH_IT) * seconds][
        :TRIALS
    ]


def _expected(plan: ScheduleCandidate, base: ScheduleCandidate, seconds: float) -> float:
    """Of a whole step: what 1F1B's really took beyond its simulation comes on top."""
    return plan.seconds + seconds - base.seconds


def _try(
    calibration: ScheduleProfiler,
    plans: list[ScheduleCandidate],
    base: ScheduleCandidate,
    seconds: float,
) -> list[tuple[ScheduleCandidate, float]]:
    """Plans with the measured seconds of their steps, until one keeps what it promised."""
    tried: list[tuple[ScheduleCandidate, float]] = []
    for plan in plans:
        measured = calibration.seconds(
            _config_of(calibration.config, plan.schedule, list(plan.counts)), plan.schedule
        )
        tried.append((plan, measured))
        if measured <= min(
            (1 + AS_SAID) * _expected(plan, base, seconds), (1 - WORTH_IT / 2) * seconds
        ):
            break
    calibration.clear()
    return tried


def _limit(config: Config, world: MeshAxis, device: torch.device, ranks_here: int) -> float:
    """Bytes that each rank may hold: as told, else what the fullest machine has for one."""
    if config.parallel.autotune_memory_gib is not None:
        return config.parallel.autotune_memory_gib * 2**30
    mine = torch.tensor(
        OF_FREE * device_module.free_memory(device, ranks_here), dtype=torch.float64, device=device
    )
    return float(all_reduce(mine, world, op=dist.ReduceOp.MIN))


# -- words -------------------------------------------------------------------------------------------------------------


def _changes(
    plan: ScheduleCandidate, measured: float, base: ScheduleCandidate, seconds: float, limit: float
) -> str:
    return (
        f"{_named(plan)}: a step takes {_ms(measured)} before its update as measured ({_ms(_expected(plan, base, seconds))} predicted) "
        f"and {_ms(seconds)} under {_named(base)}, as ranks wait {plan.waiting:.0%} and not {base.waiting:.0%} of their time; "
        f"the fullest rank holds {max(plan.memory) / 2**30:.2g} of {limit / 2**30:.3g} GiB"
    )


def _stays(
    base: ScheduleCandidate,
    seconds: float,
    plans: list[ScheduleCandidate],
    tried: list[tuple[ScheduleCandidate, float]],
) -> str:
    others = [
        f"{_named(plan)} took {_ms(measured)} ({_ms(_expected(plan, base, seconds))} predicted)"
        for plan, measured in tried
    ]
    if not others and plans:
        others = [
            f"the best other, {_named(plans[0])}, is predicted to take {_ms(_expected(plans[0], base, seconds))}"
        ]
    return f"{_named(base)}: a step takes {_ms(seconds)} before its update; " + (
        "; ".join(others) or "nothing else fits"
    )


def _named(plan: ScheduleCandidate) -> str:
    """The schedule, its cut and why: `zb-v with [2, 1, 1, 2] blocks by stage`."""
    placement = plan.schedule.placement
    name = plan.schedule.name
    if name == "list":
        name = "a schedule made for these times"
    chunks = "" if placement.chunks == 1 else f" in a {'V' if placement.shape == 'v' else 'loop'}"
    return f"{name} with {list(plan.counts)} blocks by stage{chunks}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


# -- the config, and what is kept --------------------------------------------------------------------------------------


def _config_of(config: Config, schedule: Schedule, counts: list[int]) -> Config:
    """As if the user had written it."""
    name, chunks = schedule.name, schedule.placement.chunks
    if name not in SCHEDULES:
        return _replaced(
            config, schedule=str(Path(config.run.output_dir) / ACTIONS), layers_per_stage=counts
        )
    return _replaced(
        config,
        schedule=name,
        virtual=chunks if SCHEDULES[name].any_chunks else None,
        layers_per_stage=counts,
    )


def _replaced(config: Config, **parallel: Any) -> Config:
    return dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, autotune_memory_gib=None, **parallel)
    )


def _asked(config: Config, architecture: TransformerConfig, mesh: ProcessMesh) -> dict[str, Any]:
    """What a choice was made for."""
    p, train = config.parallel, config.train
    asked = {
        "model": architecture.config.to_dict(),
        "tensor": p.tensor,
        "pipeline": p.pipeline,
        "data": mesh.data.size,
        "sequence": p.sequence,
        "zero": p.zero,
        "offload": p.offload,
        "memory_gib": p.autotune_memory_gib,
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size,
        "dtype": train.dtype,
        "recompute": train.recompute,
        "lora": dataclasses.asdict(config.lora),
        "task": config.task,
        "sequence_length": config.data.sequence_length,
    }
    return json.loads(json.dumps(asked, default=str))


def _write(config: Config, asked: dict[str, Any], choice: _Choice) -> None:
    folder = Path(config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settled = _config_of(config, choice.schedule, choice.counts).parallel
    if choice.schedule.name not in SCHEDULES:
        (folder / ACTIONS).write_text(write_schedule(choice.schedule), encoding="utf-8")
    kept = {
        "schedule": settled.schedule,
        "virtual": settled.virtual,
        "layers_per_stage": choice.counts,
        "words": choice.words,
        "asked": asked,
    }
    (folder / CHOICE).write_text(json.dumps(kept, indent=1), encoding="utf-8")


def _read(config: Config, asked: dict[str, Any]) -> _Choice | None:
    """What this run chose when it began; None where that is not known or was for something else."""
    path = Path(config.run.output_dir) / CHOICE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] != asked:
            return None
        microbatches = config.microbatches(asked["data"])
        name = (
            str(path.with_name(ACTIONS)) if kept["schedule"].endswith(".csv") else kept["schedule"]
        )
        schedule = make_schedule(
            name,
            ranks=config.parallel.pipeline,
            microbatches=microbatches,
            virtual_stages=kept["virtual"],
        )
        counts = [int(count) for count in kept["layers_per_stage"]]
        words = f"{schedule.name} with {counts} blocks by stage, as chosen when the run began ({path} keeps it)"
        return _Choice(schedule, counts, words)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
        return None
