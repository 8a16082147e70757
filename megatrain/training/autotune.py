"""The choice of `parallel.schedule: auto`: schedule, placement and partition of the layers.

1. The stages are measured under 1F1B (calibrate.py), and alternatives are simulated
   (planner/schedule_search.py).
2. The fastest candidates are measured as well, as complete steps. One replaces 1F1B only if its
   measured steps are faster.
3. The run is built as if its config contained the choice: `config.yaml` in its folder names the
   schedule and `layers_per_stage`.

Rank 0 decides for all ranks. The choice is kept in the folder of the run, so that a killed run
resumes with the same partition and schedule, bit for bit.
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

MIN_GAIN = 0.02
"""Share of the step time that a candidate must gain as simulated; half of it as measured."""
TRIALS = 3
"""Largest number of candidates that are measured."""
PREDICTION_TOLERANCE = 0.05
"""A candidate whose measured time exceeds the prediction by at most this share ends the trials."""
FREE_MEMORY_SHARE = 0.8
"""Share of a rank's free memory that a schedule may use; the rest is for what is not counted."""
CHOICE, ACTIONS = "autotuned_schedule.json", "autotuned_schedule.csv"
OLD_CHOICE, OLD_ACTIONS = "schedule.json", "schedule.csv"
"""Names in the folders of runs that began before the files were renamed."""


class ResolvedSchedule(NamedTuple):
    """A config without `auto`.

    Attributes:
        schedule: the schedule; None if it follows from the config.
        channels: the communicator that the measurements used; None without measurements.
    """

    config: Config
    schedule: Schedule | None = None
    channels: P2PCommunicator | None = None


class _Choice(NamedTuple):
    """A schedule, the blocks of each stage, and the reason of the choice."""

    schedule: Schedule
    counts: list[int]
    reason: str


def resolve_schedule(
    config: Config,
    architecture: TransformerConfig,
    mesh: ProcessMesh,
    device: torch.device,
    *,
    batches: Callable[[], Sequence[Batch]],
    resumed: bool = False,
    local_ranks: int = 1,
) -> ResolvedSchedule:
    """Replaces schedule `auto` by a choice; returns other configs unchanged. All ranks call it.

    Args:
        batches: returns the microbatches to measure with, such as those of the first step.
        resumed: the run resumes from a checkpoint, and keeps its choice if that still applies.
        local_ranks: the number of ranks on this machine, which share its memory.
    """
    if config.parallel.schedule != "auto":
        return ResolvedSchedule(config)
    if mesh.pipeline.size == 1:
        return ResolvedSchedule(_replaced(config, schedule="1f1b"))
    conditions = _conditions(config, architecture, mesh)
    choice = broadcast_object(
        _read(config, conditions) if resumed and mesh.rank == 0 else None, mesh.world
    )
    channels = None
    if choice is None:
        calibration = ScheduleProfiler(config, architecture, mesh, device, batches())
        choice, channels = (
            _measure(calibration, _limit(config, mesh.world, device, local_ranks)),
            calibration.channels,
        )
        if mesh.rank == 0:
            _write(config, conditions, choice)
    if mesh.rank == 0:
        logger.info(f"  schedule auto: {choice.reason}")
    return ResolvedSchedule(
        _config_of(config, choice.schedule, choice.counts), choice.schedule, channels
    )


# -- the choice ----------------------------------------------------------------------------------


def _measure(calibration: ScheduleProfiler, limit: float) -> _Choice:
    """Measures 1F1B, simulates candidates and measures the best; returns the same on all ranks."""
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
        needed = max(base.memory) / 2**30
        raise ConfigError(
            "parallel.autotune_memory_gib",
            config.parallel.autotune_memory_gib,
            f"must allow some schedule; 1f1b needs {needed:.3g} GiB on its fullest rank",
            "or use more pipeline ranks, a smaller train.micro_batch_size or train.recompute",
            fix={"parallel.autotune_memory_gib": math.ceil(needed)},
        )
    tried = _try(
        calibration,
        _promising(base, plans, seconds) if fits else plans[:TRIALS],
        base,
        seconds if fits else math.inf,
    )
    plan, measured = min(tried, key=lambda trial: trial[1], default=(base, seconds))
    if fits and measured > (1 - MIN_GAIN / 2) * seconds:
        return _Choice(
            base.schedule, list(base.counts), _describe_base(base, seconds, plans, tried)
        )
    return _Choice(
        plan.schedule, list(plan.counts), _describe_choice(plan, measured, base, seconds, limit)
    )


def _promising(
    base: ScheduleCandidate, plans: list[ScheduleCandidate], seconds: float
) -> list[ScheduleCandidate]:
    return [plan for plan in plans if _expected(plan, base, seconds) <= (1 - MIN_GAIN) * seconds][
        :TRIALS
    ]


def _expected(plan: ScheduleCandidate, base: ScheduleCandidate, seconds: float) -> float:
    """Returns the expected time of a step.

    It is the simulated time plus the difference between 1F1B as measured and as simulated.
    """
    return plan.seconds + seconds - base.seconds


def _try(
    calibration: ScheduleProfiler,
    plans: list[ScheduleCandidate],
    base: ScheduleCandidate,
    seconds: float,
) -> list[tuple[ScheduleCandidate, float]]:
    """Measures candidates until one is as fast as expected; returns their seconds per step."""
    tried: list[tuple[ScheduleCandidate, float]] = []
    for plan in plans:
        measured = calibration.seconds(
            _config_of(calibration.config, plan.schedule, list(plan.counts)), plan.schedule
        )
        tried.append((plan, measured))
        if measured <= min(
            (1 + PREDICTION_TOLERANCE) * _expected(plan, base, seconds),
            (1 - MIN_GAIN / 2) * seconds,
        ):
            break
    calibration.clear()
    return tried


def _limit(config: Config, world: MeshAxis, device: torch.device, local_ranks: int) -> float:
    """Returns the bytes that each rank may use: the setting, else the least free memory."""
    if config.parallel.autotune_memory_gib is not None:
        return config.parallel.autotune_memory_gib * 2**30
    mine = torch.tensor(
        FREE_MEMORY_SHARE * device_module.free_memory(device, local_ranks),
        dtype=torch.float64,
        device=device,
    )
    return float(all_reduce(mine, world, op=dist.ReduceOp.MIN))


# -- messages ------------------------------------------------------------------------------------


def _describe_choice(
    plan: ScheduleCandidate, measured: float, base: ScheduleCandidate, seconds: float, limit: float
) -> str:
    """Returns why `plan` replaces 1F1B."""
    return (
        f"{_named(plan)}: a step takes {_ms(measured)} before its update "
        f"({_ms(_expected(plan, base, seconds))} predicted), and {_ms(seconds)} under "
        f"{_named(base)}; ranks wait {plan.waiting:.0%} instead of {base.waiting:.0%} of their "
        f"time; the fullest rank uses {max(plan.memory) / 2**30:.2g} of {limit / 2**30:.3g} GiB"
    )


def _describe_base(
    base: ScheduleCandidate,
    seconds: float,
    plans: list[ScheduleCandidate],
    tried: list[tuple[ScheduleCandidate, float]],
) -> str:
    """Returns why 1F1B stays."""
    others = [
        f"{_named(plan)} took {_ms(measured)} ({_ms(_expected(plan, base, seconds))} predicted)"
        for plan, measured in tried
    ]
    if not others and plans:
        predicted = _ms(_expected(plans[0], base, seconds))
        others = [f"the best alternative, {_named(plans[0])}, is predicted to take {predicted}"]
    alternatives = "; ".join(others) or "no other schedule fits"
    return f"{_named(base)}: a step takes {_ms(seconds)} before its update; {alternatives}"


def _named(plan: ScheduleCandidate) -> str:
    """Returns text such as `zb-v with [2, 1, 1, 2] blocks by stage`."""
    placement = plan.schedule.placement
    name = plan.schedule.name
    if name == "list":
        name = "a schedule built for these times"
    chunks = "" if placement.chunks == 1 else f" in a {'V' if placement.shape == 'v' else 'loop'}"
    return f"{name} with {list(plan.counts)} blocks by stage{chunks}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


# -- the config, and what is kept ----------------------------------------------------------------


def _config_of(config: Config, schedule: Schedule, counts: list[int]) -> Config:
    """Returns the config as if the user had written the choice."""
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


def _conditions(
    config: Config, architecture: TransformerConfig, mesh: ProcessMesh
) -> dict[str, Any]:
    """Returns the settings that a choice depends on."""
    p, train = config.parallel, config.train
    conditions = {
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
    return json.loads(json.dumps(conditions, default=str))


def _write(config: Config, conditions: dict[str, Any], choice: _Choice) -> None:
    folder = Path(config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settled = _config_of(config, choice.schedule, choice.counts).parallel
    if choice.schedule.name not in SCHEDULES:
        (folder / ACTIONS).write_text(write_schedule(choice.schedule), encoding="utf-8")
    kept = {
        "schedule": settled.schedule,
        "virtual": settled.virtual,
        "layers_per_stage": choice.counts,
        "reason": choice.reason,
        "conditions": conditions,
    }
    (folder / CHOICE).write_text(json.dumps(kept, indent=1), encoding="utf-8")


def _read(config: Config, conditions: dict[str, Any]) -> _Choice | None:
    """Returns the choice of an earlier attempt; None if there is none for the same conditions."""
    folder = Path(config.run.output_dir)
    path = folder / CHOICE if (folder / CHOICE).exists() else folder / OLD_CHOICE
    actions = ACTIONS if path.name == CHOICE else OLD_ACTIONS
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("conditions", kept.get("asked")) != conditions:
            return None
        microbatches = config.microbatches(conditions["data"])
        name = str(folder / actions) if kept["schedule"].endswith(".csv") else kept["schedule"]
        schedule = make_schedule(
            name,
            ranks=config.parallel.pipeline,
            microbatches=microbatches,
            virtual_stages=kept["virtual"],
        )
        counts = [int(count) for count in kept["layers_per_stage"]]
        reason = (
            f"{schedule.name} with {counts} blocks by stage, chosen by an earlier attempt ({path})"
        )
        return _Choice(schedule, counts, reason)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
        return None
