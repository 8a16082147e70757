"""Reads the folder of a run, whether the run is running, has ended or was killed."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatrain.config.renamed import migrate
from megatrain.errors import UserError
from megatrain.report.event_timeline import EventTimeline, read_timeline
from megatrain.report.stage_times import StageTimes, read_stages
from megatrain.telemetry import events
from megatrain.telemetry.bubble_analysis import PipelineProfile, profile_pipeline
from megatrain.telemetry.curves import Curve, Point, read_curves
from megatrain.telemetry.metrics import FILE_NAME, rolled_back_path
from megatrain.telemetry.trace_format import read_traces


class RunFolder(NamedTuple):
    """Contents of one run folder."""

    path: Path
    name: str
    config: dict[str, Any]
    """Nested mappings; empty if config.yaml cannot be read."""
    config_text: str
    curves: dict[str, Curve]
    rolled_back: Curve | None
    """Loss of steps that a rollback undid."""
    timeline: EventTimeline
    stages: list[StageTimes]
    profile: PipelineProfile | None
    """Profile of the traced steps, if any."""
    last_written: datetime | None
    """Time of the last metrics."""

    def setting(self, name: str, default: Any = None) -> Any:
        """Returns the setting `section.key` of the run's config."""
        found: Any = self.config
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return default if found is None else found

    @property
    def last(self) -> dict[str, Point]:
        """The last point of each metric."""
        return {name: curve.last for name, curve in self.curves.items()}

    @property
    def is_on_cpu(self) -> bool:
        start = self.timeline.start
        return start is not None and start.fields.get("device") == "cpu"


def read_run(path: Path) -> RunFolder:
    """Reads a run folder.

    Raises:
        UserError: it is not a folder, or has neither metrics nor events.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    metrics = path / FILE_NAME
    if not metrics.exists() and not (path / events.FILE_NAME).exists():
        raise UserError(
            f"{path} contains neither {FILE_NAME} nor {events.FILE_NAME}; "
            "requires the output folder of a run (run.output_dir)"
        )
    text, config = _read_config(path / "config.yaml")
    run = config.get("run")
    name = (run.get("name") if isinstance(run, dict) else None) or path.resolve().name
    timeline = read_timeline(events.read(path))
    return RunFolder(
        path=path,
        name=str(name),
        config=config,
        config_text=text,
        curves=read_curves(metrics),
        rolled_back=read_curves(rolled_back_path(path)).get("loss"),
        timeline=timeline,
        stages=read_stages(path, timeline.start),
        profile=_profile(path),
        last_written=_last_written(metrics),
    )


def _last_written(path: Path) -> datetime | None:
    if not path.exists():
        return None
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone()


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Reads a config without validation: its settings may be those of another version."""
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return "", {}
    return text, migrate(config) if isinstance(config, dict) else {}


def _profile(path: Path) -> PipelineProfile | None:
    try:
        return profile_pipeline(read_traces(path))
    except UserError:  # there are no traces, or incomplete ones; `megatrain profile` explains
        return None
