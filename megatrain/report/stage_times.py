"""How the ranks of each pipeline stage spend a step, from the ends of their own logs: the last steps that they told of."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from megatrain import files
from megatrain.telemetry.events import Event

_END = 1 << 13
"""Bytes of each log that are read: some twenty-five steps."""

_FIGURES = ("pipeline", "forward", "backward", "waiting", "seconds", "peak_memory")


class StageTimes(NamedTuple):
    """Means over a pipeline rank's tensor and data ranks and their last steps; seconds. `rest` is what is not the pipeline's."""

    pipeline: int
    ranks: int
    forward: float
    backward: float
    waiting: float
    rest: float
    peak_memory: int
    """Bytes, of the rank with the most."""

    @property
    def whole(self) -> float:
        return self.forward + self.backward + self.waiting + self.rest


def read_stages(run_folder: Path, start: Event | None) -> list[StageTimes]:
    """By pipeline rank, of the last start's ranks: earlier ones may have been more."""
    ranks = start.fields.get("ranks") if start is not None else None
    found: dict[int, list[_Rank]] = {}
    for path in sorted((run_folder / "logs").glob("rank-*.jsonl"))[
        : ranks if isinstance(ranks, int) else None
    ]:
        lines = _figures(path)
        if lines:
            means = {
                name: statistics.fmean(line[name] for line in lines)
                for name in ("forward", "backward", "waiting", "seconds")
            }
            found.setdefault(lines[-1]["pipeline"], []).append(
                _Rank(**means, peak_memory=max(line["peak_memory"] for line in lines))
            )
    return [_stage(pipeline, found[pipeline]) for pipeline in sorted(found)]


class _Rank(NamedTuple):
    """Means of its last steps."""

    forward: float
    backward: float
    waiting: float
    seconds: float
    peak_memory: int


def _figures(path: Path) -> list[dict[str, Any]]:
    """Of the rank's last start."""
    lines: list[dict[str, Any]] = []
    for line in files.read(path, last=_END):
        if line.get("message") == "start":
            lines.clear()
        elif line.get("message") == "figures" and all(
            isinstance(line.get(name), int | float) for name in _FIGURES
        ):
            lines.append(line)
    return lines


def _stage(pipeline: int, ranks: list[_Rank]) -> StageTimes:
    forward, backward, waiting, seconds, _ = (
        statistics.fmean(values) for values in zip(*ranks, strict=True)
    )
    rest = max(0.0, seconds - forward - backward - waiting)
    return StageTimes(
        pipeline,
        len(ranks),
        forward,
        backward,
        waiting,
        rest,
        max(rank.peak_memory for rank in ranks),
    )
