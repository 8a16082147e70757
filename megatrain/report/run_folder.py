"""What a run's folder says of the run, whether it goes on, has ended or was killed."""

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
    """All that the page says of one run. `config` is that of the folder as nested mappings, empty where it cannot be read."""

    path: Path
    name: str
    config: dict[str, Any]
    config_text: str
    curves: dict[str, Curve]
    undone: Curve | None
    """The loss of steps that a rollback took back."""
    story: EventTimeline
    stages: list[StageTimes]
    profile: PipelineProfile | None
    """Of the steps that it traced, if it did."""
    told: datetime | None
    """When it last wrote a figure."""

    def setting(self, name: str, default: Any = None) -> Any:
        """Of the run's config, by `section.key`."""
        found: Any = self.config
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return default if found is None else found

    @property
    def last(self) -> dict[str, Point]:
        """Each figure's last point."""
        return {name: curve.last for name, curve in self.curves.items()}


def read_run(path: Path) -> RunFolder:
    """Read the folder; raises UserError where it is none of a run."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    if not any((path / name).exists() for name in (FILE_NAME, events.FILE_NAME)):
        raise UserError(f"{path} holds no run: neither {FILE_NAME} nor {events.FILE_NAME} is there")
    text, config = _config(path / "config.yaml")
    run = config.get("run")
    name = (run.get("name") if isinstance(run, dict) else None) or path.resolve().name
    metrics, story = path / FILE_NAME, read_timeline(events.read(path))
    told = (
        datetime.fromtimestamp(metrics.stat().st_mtime).astimezone() if metrics.exists() else None
    )
    return RunFolder(
        path,
        str(name),
        config,
        text,
        read_curves(metrics),
        read_curves(rolled_back_path(path)).get("loss"),
        story,
        read_stages(path, story.start),
        _profile(path),
        told,
    )


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    """As it is there: the settings may be those of another version."""
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return "", {}
    return text, migrate(config) if isinstance(config, dict) else {}


def _profile(path: Path) -> PipelineProfile | None:
    try:
        return profile_pipeline(read_traces(path))
    except UserError:  # nothing was traced, or not whole yet; `megatrain profile` says what
        return None
