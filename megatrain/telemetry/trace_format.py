"""What a traced step leaves behind: one JSON file a rank and step, written by the ranks, read by the x-ray.

    RUN/trace/step-00000020-rank-00001.json

A step's files are used together or not at all; `run` tells those of one run from what an earlier one left in the folder.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatrain.errors import UserError
from megatrain.pipeline.schedule import Action, Placement, Schedule, peak_activations
from megatrain.pipeline.verify import ScheduleError, check_schedule

FOLDER = "trace"
_NAME = re.compile(r"step-(\d{8})-rank-(\d{5})\.json")


@dataclass(frozen=True)
class TracedAction:
    """When an action ran, in seconds of rank 0's clock; from `start` to `ready` it waited for what it takes in."""

    action: Action
    start: float
    ready: float
    end: float
    layers: dict[int, float]
    """Seconds of each layer that could be told apart, by its place in the model (0 is the embedding)."""


@dataclass(frozen=True)
class RankTrace:
    """One step on one rank."""

    run: float
    """When the run's tracing began, in seconds since 1970 on rank 0: the same on all its ranks."""
    step: int
    rank: int
    world_size: int
    pipeline: int
    data: int
    tensor: int
    schedule: str
    placement: Placement
    stages: list[list[str]]
    """Titles of each stage's layers, in the model's order."""
    seconds: float
    """The whole step, with what comes before and after the pipeline."""
    peak_memory: int
    """Bytes."""
    memory: str
    """What `peak_memory` is the peak of."""
    clock_error: float
    """Times of this rank may be off by as many seconds against rank 0's."""
    config: dict[str, Any]
    """The run's config, resolved."""
    actions: list[TracedAction]


@dataclass(frozen=True)
class StepTrace:
    """One step on all ranks."""

    step: int
    ranks: list[RankTrace]

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return max(trace.seconds for trace in self.ranks)

    def pipelines(self) -> list[list[RankTrace]]:
        """Ranks that pass microbatches to each other, in the pipeline's order: one list for each (data, tensor)."""
        found: dict[tuple[int, int], list[RankTrace]] = {}
        for trace in sorted(self.ranks, key=lambda trace: trace.pipeline):
            found.setdefault((trace.data, trace.tensor), []).append(trace)
        return [found[place] for place in sorted(found)]


def schedule_of(pipeline: list[RankTrace]) -> Schedule:
    """The schedule that the ranks of a pipeline ran."""
    actions = [[traced.action for traced in trace.actions] for trace in pipeline]
    peaks = [peak_activations(of_rank) for of_rank in actions]
    return Schedule(pipeline[0].schedule, pipeline[0].placement, actions, peaks)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_trace(run_folder: Path, trace: RankTrace) -> None:
    """Write one rank's step; the file is whole or not there."""
    folder = run_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{trace.step:08d}-rank-{trace.rank:05d}.json"
    raw = asdict(trace)
    raw["placement"] = list(trace.placement)
    raw["actions"] = [
        [*a.action, a.start, a.ready, a.end, list(a.layers.items())] for a in trace.actions
    ]
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(raw), encoding="utf-8")
    os.replace(new, path)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_traces(run_folder: Path) -> list[StepTrace]:
    """The traced steps of the run that traced last into this folder.

    Raises UserError when there is none, or when a step is not whole.
    """
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is not a folder")
    paths = _paths(run_folder / FOLDER)
    if not paths:
        raise UserError(
            f"{run_folder} holds no trace; set profile.steps, as profile.steps=[20,22], and train beyond these steps"
        )
    for step, of_step in paths.items():
        if 0 not in of_step:
            raise UserError(
                f"{run_folder / FOLDER} lacks rank 0's file of step {step}; trace the step again"
            )
    firsts = [_read(of_step[0]) for of_step in paths.values()]
    newest = max(first.run for first in firsts)
    return [_whole_step(first, paths[first.step]) for first in firsts if first.run == newest]


def _paths(folder: Path) -> dict[int, dict[int, Path]]:
    """Files by step and rank."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("step-*.json")):
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    return found


def _whole_step(first: RankTrace, paths: dict[int, Path]) -> StepTrace:
    missing = [rank for rank in range(first.world_size) if rank not in paths]
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        ranks = "rank" if len(missing) == 1 else "ranks"
        raise UserError(
            f"{paths[0].parent} lacks step {first.step} of {ranks} {shown} (of {first.world_size}); "
            "bring the files together from all machines, or trace the step again"
        )
    traces = [first, *(_read(paths[rank]) for rank in range(1, first.world_size))]
    for trace in traces:
        if trace.run != first.run:
            raise UserError(
                f"{paths[trace.rank]} is of another run than {paths[0]}; trace step {first.step} again"
            )
    step = StepTrace(first.step, traces)
    _check_pipelines(step, paths[0].parent)
    return step


def _check_pipelines(step: StepTrace, folder: Path) -> None:
    for pipeline in step.pipelines():
        schedule = schedule_of(pipeline)
        microbatches = 1 + max(
            action.microbatch for actions in schedule.actions for action in actions
        )
        try:
            check_schedule(schedule, microbatches)
        except ScheduleError as error:
            raise UserError(
                f"{folder} does not hold the whole of step {step.step}: {error}; trace the step again"
            ) from None


def _read(path: Path) -> RankTrace:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["placement"] = Placement(*raw["placement"])
        raw["actions"] = [_action(*fields) for fields in raw["actions"]]
        return RankTrace(**raw)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged or no trace; trace the step again") from None


def _action(
    kind: Any,
    microbatch: int,
    chunk: int,
    start: float,
    ready: float,
    end: float,
    layers: list[Any],
) -> TracedAction:
    return TracedAction(
        Action(kind, microbatch, chunk),
        float(start),
        float(ready),
        float(end),
        {int(k): float(v) for k, v in layers},
    )
