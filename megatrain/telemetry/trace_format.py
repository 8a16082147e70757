"""Traces of steps for `megatrain profile`: one JSON file per rank and step.

    RUN/traces/step-00000020-rank-00001.json

The files of a step are used together or not at all; `run` identifies the attempt that wrote them.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatrain.errors import UserError
from megatrain.files import write_atomically
from megatrain.pipeline.schedule import Action, Placement, Schedule, peak_activations
from megatrain.pipeline.verify import ScheduleError, check_schedule

FOLDER = "traces"
_OLD_FOLDER = "trace"
_NAME = re.compile(r"step-(\d{8})-rank-(\d{5})\.json")


@dataclass(frozen=True)
class TracedAction:
    """Times of an action by rank 0's clock; it waited for its input from `start` to `ready`."""

    action: Action
    start: float
    ready: float
    end: float
    layers: dict[int, float]
    """Seconds of each layer that could be measured, by its index (0 is the embedding)."""


@dataclass(frozen=True)
class RankTrace:
    """One step on one rank."""

    run: float
    """Start of the attempt's tracing, in seconds since 1970 on rank 0; equal on all ranks."""
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
    """Duration of the step, including work before and after the pipeline."""
    peak_memory: int
    """Bytes."""
    memory: str
    """Description of the memory that `peak_memory` measures."""
    clock_error: float
    """Possible difference in seconds between this rank's times and rank 0's."""
    config: dict[str, Any]
    """The resolved config of the run."""
    actions: list[TracedAction]


@dataclass(frozen=True)
class StepTrace:
    """One step on all ranks."""

    step: int
    ranks: list[RankTrace]

    @property
    def seconds(self) -> float:
        """Duration of the step on the slowest rank."""
        return max(trace.seconds for trace in self.ranks)

    def pipelines(self) -> list[list[RankTrace]]:
        """Returns the ranks of each pipeline in order, by (data, tensor) rank."""
        found: dict[tuple[int, int], list[RankTrace]] = {}
        for trace in sorted(self.ranks, key=lambda trace: trace.pipeline):
            found.setdefault((trace.data, trace.tensor), []).append(trace)
        return [found[ranks] for ranks in sorted(found)]


def schedule_of(pipeline: list[RankTrace]) -> Schedule:
    """Returns the schedule that the ranks of a pipeline ran."""
    actions = [[traced.action for traced in trace.actions] for trace in pipeline]
    peaks = [peak_activations(rank_actions) for rank_actions in actions]
    return Schedule(pipeline[0].schedule, pipeline[0].placement, actions, peaks)


# -- writing -------------------------------------------------------------------------------------


def write_trace(run_folder: Path, trace: RankTrace) -> None:
    """Writes one rank's step atomically."""
    folder = run_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{trace.step:08d}-rank-{trace.rank:05d}.json"
    raw = asdict(trace)
    raw["placement"] = list(trace.placement)
    raw["actions"] = [
        [*a.action, a.start, a.ready, a.end, list(a.layers.items())] for a in trace.actions
    ]
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(raw), encoding="utf-8")


# -- reading -------------------------------------------------------------------------------------


def read_traces(run_folder: Path) -> list[StepTrace]:
    """Returns the traced steps of the latest attempt that wrote traces into this folder.

    Raises:
        UserError: if there are none, or a step is incomplete.
    """
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is not a folder")
    folder = run_folder / FOLDER
    if not folder.is_dir():
        folder = run_folder / _OLD_FOLDER
    paths = _paths(folder)
    if not paths:
        raise UserError(
            f"{run_folder} has no traces; set profile.steps and train past these steps",
            fix={"profile.steps": [20, 22]},
        )
    for step, step_paths in paths.items():
        if 0 not in step_paths:
            raise UserError(f"{folder}: step {step} of rank 0 is missing; trace the step again")
    firsts = [_read(step_paths[0]) for step_paths in paths.values()]
    newest = max(first.run for first in firsts)
    return [_complete_step(first, paths[first.step]) for first in firsts if first.run == newest]


def _paths(folder: Path) -> dict[int, dict[int, Path]]:
    """Returns the trace files by step and rank."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("step-*.json")):
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    return found


def _complete_step(first: RankTrace, paths: dict[int, Path]) -> StepTrace:
    missing = [rank for rank in range(first.world_size) if rank not in paths]
    if missing:
        ranks = "rank" if len(missing) == 1 else "ranks"
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{paths[0].parent}: step {first.step} of {ranks} {names} "
            f"(of {first.world_size}) is missing; collect the files of all machines in one folder, "
            "or trace the step again"
        )
    traces = [first, *(_read(paths[rank]) for rank in range(1, first.world_size))]
    for trace in traces:
        if trace.run != first.run:
            raise UserError(
                f"{paths[trace.rank]} and {paths[0]} are of different attempts; "
                f"trace step {first.step} again"
            )
    step = StepTrace(first.step, traces)
    _check_pipelines(step, paths[0].parent)
    return step


def _check_pipelines(step: StepTrace, folder: Path) -> None:
    for pipeline in step.pipelines():
        schedule = schedule_of(pipeline)
        try:
            check_schedule(schedule, schedule.microbatches)
        except ScheduleError as error:
            raise UserError(
                f"{folder}: step {step.step} is incomplete: {error}; trace the step again"
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
        raise UserError(f"{path} is corrupt or not a trace; trace the step again") from None


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
