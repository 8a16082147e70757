"""Step times of each pipeline rank, from the last steps in the ranks' own logs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatrain import files
from megatrain.telemetry.events import Event

_READ_BYTES = 1 << 13
"""Bytes at the end of each log that are read: about 25 steps."""
_TIMES = ("forward", "backward", "waiting", "seconds")


class StageTimes(NamedTuple):
    """Mean seconds per step over the tensor and data ranks of a pipeline rank."""

    pipeline_rank: int
    forward: float
    backward: float
    waiting: float
    other: float
    """Time outside the pipeline."""
    peak_memory: int
    """Bytes; maximum over the ranks."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.waiting + self.other


def read_stages(run_folder: Path, start: Event | None) -> list[StageTimes]:
    """Returns the times of each pipeline rank; only ranks of the last start count."""
    ranks = start.fields.get("ranks") if start is not None else None
    paths = sorted((run_folder / "logs").glob("rank-*.jsonl"))
    found: dict[int, list[list[dict[str, Any]]]] = {}
    for path in paths[: ranks if isinstance(ranks, int) else None]:
        steps = _read_steps(path)
        if steps:
            found.setdefault(steps[-1]["pipeline"], []).append(steps)
    return [_mean(pipeline_rank, found[pipeline_rank]) for pipeline_rank in sorted(found)]


def _read_steps(path: Path) -> list[dict[str, Any]]:
    """Returns the logged steps of the rank's last start."""
    steps: list[dict[str, Any]] = []
    for line in files.read(path, last=_READ_BYTES):
        if line.get("message") == "start":
            steps.clear()
        elif line.get("message") == "figures" and all(
            isinstance(line.get(name), int | float) for name in ("pipeline", *_TIMES, "peak_memory")
        ):
            steps.append(line)
    return steps


def _mean(pipeline_rank: int, ranks: Sequence[Sequence[dict[str, Any]]]) -> StageTimes:
    forward, backward, waiting, seconds = (
        statistics.fmean(statistics.fmean(step[name] for step in steps) for steps in ranks)
        for name in _TIMES
    )
    other = max(0.0, seconds - forward - backward - waiting)
    peak_memory = max(step["peak_memory"] for steps in ranks for step in steps)
    return StageTimes(pipeline_rank, forward, backward, waiting, other, peak_memory)
