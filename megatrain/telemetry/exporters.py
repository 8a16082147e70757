"""Exports rank 0's metrics to Weights & Biases (`run.wandb`) and Prometheus (`run.prometheus`).

A run does not start if a library is missing. During training an exporter that fails is logged and
removed: it never stops the run.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatrain.config.schema import RunConfig
from megatrain.errors import ConfigError
from megatrain.telemetry.metrics import Value

logger = logging.getLogger("megatrain")

_LIBRARIES = {"wandb": "wandb", "prometheus": "prometheus_client"}
"""By setting, which is also the name of the package extra."""


class Exporter(Protocol):
    """A destination of metrics."""

    name: str

    def write(self, step: int, values: Mapping[str, Value]) -> None: ...

    def close(self) -> None: ...


def check_exporters(run: RunConfig) -> None:
    """Checks the settings of exporters without sending anything.

    Raises:
        ConfigError: if a path has the wrong suffix or a library is not installed.
    """
    path = run.prometheus
    if path is not None and not path.endswith(".prom"):
        raise ConfigError(
            "run.prometheus",
            path,
            "must end in .prom, the only files that node_exporter's textfile collector reads",
            fix={"run.prometheus": f"{path}.prom"},
        )
    for setting, library in _LIBRARIES.items():
        value = getattr(run, setting)
        if value is not None and importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"run.{setting}",
                value,
                f"requires {library}, which is not installed",
                f'pip install "megatrain[{setting}]"',
                command=f"pip install {library}",
            )


class Exporters:
    """The exporters that the settings enable.

    Args:
        run: section `run` of the config.
        run_name: name of the run.
        log_every: steps between writes of the Prometheus file.
        settings: the complete config, which W&B stores.
        run_folder: folder of the run.
        after_step: step from which the run resumes, 0 at a start.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        run_name: str,
        log_every: int,
        settings: dict[str, Any],
        run_folder: Path,
        after_step: int,
    ) -> None:
        self._open: list[Exporter] = []
        if run.prometheus is not None:
            self._open.append(PrometheusFile(run.prometheus, run_name, log_every))
        if run.wandb is not None:
            run_id = _wandb_run_id(run_folder, new=after_step == 0)
            self._open.append(WandbRun(run.wandb, run_name, run_id, run_folder, settings))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Sends the metrics of a step; an exporter that fails is removed."""
        for exporter in list(self._open):
            try:
                exporter.write(step, values)
            except Exception as error:  # a service or a full disk must not stop the run
                self._open.remove(exporter)
                logger.warning(f"{exporter.name} is disabled after step {step}: {error}")

    def close(self) -> None:
        """Closes all exporters; errors are logged."""
        for exporter in self._open:
            try:
                exporter.close()
            except Exception as error:
                logger.warning(f"{exporter.name} could not be closed: {error}")
        self._open.clear()


class PrometheusFile:
    """Gauges with the last value of each metric, in a file that is replaced every `every` steps."""

    name = "run.prometheus"

    def __init__(self, path: str, run_name: str, every: int) -> None:
        from prometheus_client import CollectorRegistry

        folder = Path(path).parent
        if not folder.is_dir():
            raise ConfigError(
                "run.prometheus",
                path,
                f"requires the folder {folder} on rank 0's machine",
                "use the folder that node_exporter reads there",
                command=f"mkdir -p {folder}",
            )
        self._path = path
        self._every = every
        self._run_name = run_name
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in {"step": step, **values}.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._gauge(name).set(value)
        if step % self._every == 0:
            self._write_file()

    def close(self) -> None:
        self._write_file()

    def _gauge(self, name: str) -> Any:
        from prometheus_client import Gauge

        if name not in self._gauges:
            full_name = "megatrain_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            gauge = Gauge(
                full_name, f"{name} of the last step that has it", ["run"], registry=self._registry
            )
            self._gauges[name] = gauge.labels(run=self._run_name)
        return self._gauges[name]

    def _write_file(self) -> None:
        from prometheus_client import write_to_textfile

        write_to_textfile(self._path, self._registry)


class WandbRun:
    """The W&B run of all attempts of a run, which share an id.

    The step is a metric of each line. W&B's own step counter accepts no step twice, but a run that
    resumes from an earlier checkpoint repeats steps.
    """

    name = "run.wandb"

    def __init__(
        self, project: str, run_name: str, run_id: str, run_folder: Path, settings: dict[str, Any]
    ) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                name=run_name,
                id=run_id,
                resume="allow",
                dir=str(run_folder),
                config=settings,
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                "run.wandb",
                project,
                f"cannot be opened ({error})",
                "log in, or set WANDB_MODE=offline",
                command="wandb login",
            ) from None
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        present = {name: value for name, value in values.items() if value is not None}
        self._run.log({"step": step, **present})

    def close(self) -> None:
        self._run.finish()


def _wandb_run_id(run_folder: Path, *, new: bool) -> str:
    """Returns the id in the run folder; a new one at a start from scratch."""
    path, old_path = run_folder / "wandb_run_id", run_folder / "wandb-id"
    if not new and not path.exists() and old_path.exists():
        path = old_path
    if new or not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
