"""Where rank 0 sends figures besides metrics.jsonl, if asked: Weights & Biases (`run.wandb`), a file for Prometheus (`run.prometheus`).

A run is refused where the library is not there. Once it trains nothing that these do can end it: what fails is said once and left out
from then on.
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

from megatrain.config.loader import Config, to_dict
from megatrain.errors import ConfigError
from megatrain.telemetry.metrics import Value

logger = logging.getLogger("megatrain")

_LIBRARIES = {"wandb": "wandb", "prometheus": "prometheus_client"}
"""By the setting, which is also the name of the extra."""


class Exporter(Protocol):
    """One place that figures go to."""

    name: str

    def write(self, step: int, values: Mapping[str, Value]) -> None: ...

    def close(self) -> None: ...


def check_exporters(config: Config) -> None:
    """Refuse what cannot work; needs no ranks and sends nothing."""
    path = config.run.prometheus
    if path is not None and not path.endswith(".prom"):
        raise ConfigError(
            "run.prometheus",
            path,
            "must end in .prom: node_exporter's textfile collector reads no other file",
            f"set run.prometheus={path}.prom",
        )
    for setting, library in _LIBRARIES.items():
        value = getattr(config.run, setting)
        if value is not None and importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"run.{setting}",
                value,
                f"needs {library}, which is not installed",
                f'pip install "megatrain[{setting}]", or pip install {library}',
                command=f"pip install {library}",
            )


class Exporters:
    """All that the config asks for; `after_step` is the step that the run goes on from, 0 at a start."""

    def __init__(self, config: Config, run_folder: Path, *, after_step: int) -> None:
        self._open: list[Exporter] = []
        if config.run.prometheus is not None:
            self._open.append(PrometheusFile(config))
        if config.run.wandb is not None:
            self._open.append(WandbRun(config, run_folder, after_step=after_step))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        for exporter in list(self._open):
            try:
                exporter.write(step, values)
            except Exception as error:  # a service or a full disk must not cost the run
                self._open.remove(exporter)
                logger.warning(f"{exporter.name} gets no more figures after step {step}: {error}")

    def close(self) -> None:
        for exporter in self._open:
            try:
                exporter.close()
            except Exception as error:
                logger.warning(f"{exporter.name} was not closed: {error}")
        self._open.clear()


class PrometheusFile:
    """The last value of each figure as a gauge, in a file that is replaced whole every `train.log_every` steps and at the end."""

    def __init__(self, config: Config) -> None:
        from prometheus_client import CollectorRegistry

        assert config.run.prometheus is not None
        folder = Path(config.run.prometheus).parent
        if not folder.is_dir():
            raise ConfigError(
                "run.prometheus",
                config.run.prometheus,
                f"is to be in {folder}, which is no folder of rank 0's machine",
                "name a file in the folder that node_exporter reads there",
            )
        self.name, self._path, self._every, self._run = (
            "run.prometheus",
            config.run.prometheus,
            config.train.log_every,
            config.run_name,
        )
        self._registry, self._gauges = CollectorRegistry(), dict[str, Any]()

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in {"step": step, **values}.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._gauge(name).set(value)
        if step % self._every == 0:
            self._write()

    def close(self) -> None:
        self._write()

    def _gauge(self, name: str) -> Any:
        from prometheus_client import Gauge

        if name not in self._gauges:
            full = "megatrain_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            self._gauges[name] = Gauge(
                full, f"{name} of the last step that has one", ["run"], registry=self._registry
            ).labels(run=self._run)
        return self._gauges[name]

    def _write(self) -> None:
        from prometheus_client import write_to_textfile

        write_to_textfile(self._path, self._registry)


class WandbRun:
    """One W&B run for all starts of a run: its id is kept in the run's folder.

    Steps are a figure of each line (`step`), not W&B's own counter, which takes no step twice: a run that goes back does steps again.
    """

    def __init__(self, config: Config, run_folder: Path, *, after_step: int) -> None:
        import wandb

        self.name = "run.wandb"
        try:
            self._run = wandb.init(
                project=config.run.wandb,
                name=config.run_name,
                id=_kept_id(run_folder, afresh=after_step == 0),
                resume="allow",
                dir=str(run_folder),
                config=to_dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                "run.wandb",
                config.run.wandb,
                f"cannot be opened ({error})",
                "run `wandb login`, or set WANDB_MODE=offline",
            ) from None
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        self._run.log(
            {"step": step, **{name: value for name, value in values.items() if value is not None}}
        )

    def close(self) -> None:
        self._run.finish()


def _kept_id(run_folder: Path, *, afresh: bool) -> str:
    path = run_folder / "wandb-id"
    if afresh or not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
