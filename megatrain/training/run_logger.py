"""The records of a run: console, metrics.jsonl, events.jsonl, exporters and a plot of the loss.

Rank 0 writes them. Every rank has a logger, so that callers need not distinguish; those of other
ranks write their own times into their own logs, and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint import retention
from megatrain.checkpoint.checkpointer import SaveResult
from megatrain.checkpoint.train_state import TrainState
from megatrain.config.loader import Config, to_dict, to_yaml
from megatrain.distributed import device as device_module
from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.env import RankEnv, attempt
from megatrain.distributed.errors import is_lost_connection
from megatrain.distributed.mesh import ProcessMesh
from megatrain.errors import UserError
from megatrain.models.counts import flops_per_token, peak_flops
from megatrain.planner.run_spec import RunSpec
from megatrain.telemetry import console
from megatrain.telemetry.events import EventLog
from megatrain.telemetry.exporters import Exporters
from megatrain.telemetry.metrics import MetricsLog, Value
from megatrain.telemetry.plots import loss_name, plot_loss
from megatrain.telemetry.rank_log import rank_json_log
from megatrain.training import loss_spikes
from megatrain.training.loss_spikes import SpikeThreshold
from megatrain.training.run_plan import run_header
from megatrain.training.step_runner import StepReport
from megatrain.version import __version__

logger = logging.getLogger("megatrain")

STOPPED_BY_SIGNAL = "stopped by a signal"
"""The reason of a stop after which the run is to be resumed."""

_RESULTS = (
    "checkpoints",
    "metrics.jsonl",
    "events.jsonl",
    loss_spikes.FILE_NAME,
    "loss.png",
    "tensorboard",
)


class RunLogger:
    """The logger of a run; `begin` opens its files, once the step to resume from is known.

    Attributes:
        folder: the folder of the run.
        is_main_process: True on rank 0, which writes the files.
        events: the log of events.
    """

    def __init__(self, spec: RunSpec, env: RankEnv, device: torch.device) -> None:
        config, architecture = spec.config, spec.model
        self.folder, self.is_main_process = Path(config.run.output_dir), env.rank == 0
        self._spec, self._config, self._world_size = spec, config, env.world_size
        self._gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        self._flops = flops_per_token(
            architecture.config,
            sequence_length=config.data.sequence_length,
            frozen=config.lora.rank > 0,
            head=architecture.classifier is None,
        )
        self._peak = peak_flops(self._gpu, config.train.dtype) if self._gpu else None
        self._metrics: MetricsLog | None = None
        self._exporters: Exporters | None = None
        self._device = device
        self._resume_fields: dict[str, Any] = {}
        self._coordinates: dict[str, int] = {}
        self.events = EventLog(self.folder if self.is_main_process else None)

    def info(self, message: str) -> None:
        """Logs a message on rank 0."""
        if self.is_main_process:
            logger.info(message)

    def warning(self, message: str) -> None:
        """Logs a warning on rank 0."""
        if self.is_main_process:
            logger.warning(message)

    # -- begin and end ---------------------------------------------------------------------------

    def log_start(
        self, notes: Iterable[str], *, mesh: ProcessMesh, checkpoint: Path | None, reason: str
    ) -> None:
        """Logs the header of the run and the `start` event; all ranks call it.

        Args:
            notes: a line about each data set.
            checkpoint: the checkpoint to resume from.
            reason: why it is resumed from, or why the run starts from scratch.
        """
        if self.is_main_process:
            logger.info(run_header(self._spec, self._gpu or "cpu"))
        for note in [*notes, reason]:
            self.info(f"  {note}")
        if checkpoint is not None:
            self._resume_fields = {"from": checkpoint, "reason": reason}
        hosts = gather_objects(socket.gethostname(), mesh.world)
        parallel = self._config.parallel
        self.events.write(
            "start",
            ranks=self._world_size,
            hosts=sorted(set(hosts)),
            device=self._gpu or "cpu",
            layout={
                "tensor": mesh.tensor.size,
                "pipeline": mesh.pipeline.size,
                "data": mesh.data.size,
                "zero": parallel.zero,
                "schedule": parallel.schedule,
            },
            versions=_versions(),
            attempt=attempt(os.environ),
            resume=self._config.checkpoint.resume,
            reason=None if self._resume_fields else reason,
        )
        self._coordinates = {
            "pipeline": mesh.pipeline.rank,
            "data": mesh.data.rank,
            "tensor": mesh.tensor.rank,
        }

    def begin(self, requested: Config, state: TrainState, *, last_step: int) -> None:
        """Opens the files, and writes the requested config to the run's folder."""
        if not self.is_main_process:
            return
        (self.folder / "config.yaml").write_text(to_yaml(requested), encoding="utf-8")
        self._metrics = MetricsLog(self.folder, after_step=state.step)
        self._exporters = Exporters(
            self._config.run,
            run_name=self._config.run_name,
            log_every=self._config.train.log_every,
            settings=to_dict(self._config),
            run_folder=self.folder,
            after_step=state.step,
        )
        if self._resume_fields:
            self.events.write("resume", step=state.step, **self._resume_fields)
        if state.step >= last_step > 0:
            logger.info(
                f"no steps left: step {state.step} is done, and the run ends after step {last_step}"
            )

    def log_failure(self, error: Exception, state: TrainState) -> None:
        """Writes a `fail` event.

        A lost connection is the consequence of another rank's failure, which the watchdog records.
        """
        if isinstance(error, UserError) or not is_lost_connection(error):
            self.events.write(
                "fail", step=state.step, error=f"{type(error).__name__}: {error}"[:2000]
            )

    def finish(self, state: TrainState, stop_reason: str | None) -> None:
        """Logs the end of the run, and plots its loss.

        Args:
            stop_reason: why the run ended before its last step; None if it did not.
        """
        if not self.is_main_process:
            return
        self._log_end(state, stop_reason)
        plot_loss(
            self.folder,
            title=self._config.run_name,
            loss=loss_name(self._config.task, self._config.classification.problem),
        )
        names = [name for name in _RESULTS if (self.folder / name).exists()]
        logger.info(f"results are in {self.folder}: {', '.join(names)}")

    def _log_end(self, state: TrainState, stop_reason: str | None) -> None:
        if stop_reason == STOPPED_BY_SIGNAL:
            logger.info(f"{stop_reason} after step {state.step}; re-run the same command to resume")
            self.events.write("stop", step=state.step, reason="a signal")
        elif stop_reason is not None:
            logger.info(stop_reason)
            self.events.write("finish", step=state.step, reason=stop_reason)
        elif state.step >= self._config.steps:
            self.events.write("finish", step=state.step, reason="all steps are done")
        elif state.step == self._config.train.exit_after_step:
            self.events.write("stop", step=state.step, reason=f"train.exit_after_step={state.step}")

    def close(self) -> None:
        """Closes metrics.jsonl and the exporters."""
        if self._metrics is not None:
            self._metrics.close()
        if self._exporters is not None:
            self._exporters.close()

    # -- steps and evaluations -------------------------------------------------------------------

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Writes a line of metrics.jsonl, and passes it to the exporters of the config."""
        if self._metrics is not None and self._exporters is not None:
            self._metrics.write(step, metrics)
            self._exporters.write(step, metrics)

    def step_metrics(
        self, report: StepReport, state: TrainState, seconds: float
    ) -> dict[str, Value]:
        """Returns the metrics of a step; logs it if its update was skipped."""
        if not report.applied:
            self._log_skipped(report, state)
        rate = self._config.tokens_per_step / seconds
        flops_per_rank = rate * self._flops / self._world_size
        metrics: dict[str, Value] = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "tokens": state.tokens,
            "seconds": seconds,
            "tokens_per_second": rate,
            "tflops_per_rank": flops_per_rank / 1e12,
            "mfu": flops_per_rank / self._peak if self._peak else None,
            "skipped": not report.applied,
            **report.measures,
        }
        if state.loss_scaling is not None:
            metrics["loss_scale"] = state.loss_scaling.scale
        return metrics

    def _log_skipped(self, report: StepReport, state: TrainState) -> None:
        if report.rescaled:
            self.info(
                f"step {state.step}: skipped, because gradients overflow fp16 at this loss scale; "
                "the scale is lowered"
            )
            return
        self.warning(f"step {state.step}: skipped: {report.reason} ({state.bad_steps} in a row)")
        self.events.write(
            "skip",
            step=state.step,
            what=report.reason,
            in_a_row=state.bad_steps,
            first=state.samples - self._config.train.global_batch_size,
            last=state.samples - 1,
        )

    def log_step(
        self, step: int, report: StepReport, seconds: float, *, parts: Mapping[str, float]
    ) -> None:
        """Logs a step: a console line on rank 0, and this rank's times in its own log.

        Args:
            parts: seconds that this rank spent in forwards, in backwards and in waiting.
        """
        if (rank_log := rank_json_log()) is not None:
            rank_log.step = step
            rank_log.write(
                "INFO",
                "figures",
                **self._coordinates,
                seconds=seconds,
                **parts,
                peak_memory=device_module.peak_memory(self._device).size,
            )
        if self.is_main_process:
            rate = self._config.tokens_per_step / seconds
            line = console.StepLine(
                step=step,
                steps=self._config.steps,
                loss=report.loss,
                grad_norm=report.grad_norm,
                lr=report.lr,
                tokens_per_second=rate,
                flops_per_second=rate * self._flops,
                seconds_per_step=seconds,
            )
            logger.info(console.step_line(line))

    def log_evaluation(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        """Logs an evaluation."""
        if self.is_main_process:
            logger.info(
                console.evaluation_line(
                    step=step, steps=self._config.steps, loss=loss, measured=metrics
                )
            )

    # -- loss spikes and checkpoints -------------------------------------------------------------

    def log_spike(self, state: TrainState, threshold: SpikeThreshold) -> None:
        """Logs a loss spike that has lasted long enough."""
        stability, loss = self._config.stability, state.losses[-1]
        self.warning(
            f"step {state.step}: loss spike since step {state.spike_since}: {loss:.3f} is above "
            f"{threshold.loss:.3f} = median {threshold.median:.3f} of the last "
            f"{stability.spike_window} losses + {stability.spike_threshold:g} x deviation "
            f"{threshold.deviation:.3f} "
            f"(stability.on_loss_spike={stability.on_loss_spike})"
        )
        self.events.write(
            "spike",
            step=state.step,
            began=state.spike_since,
            loss=loss,
            limit=threshold.loss,
            median=threshold.median,
            deviation=threshold.deviation,
        )

    def log_missing_rollback(self, state: TrainState, problems: Iterable[str]) -> None:
        """Warns that a rollback has no checkpoint; `problems` describes incomplete ones."""
        details = "".join(f"; {problem}" for problem in problems)
        self.warning(
            f"step {state.step}: no complete checkpoint from before the spike; continuing without "
            f"rollback{details}"
        )

    def log_rollback(self, undone: TrainState, state: TrainState, path: Path) -> None:
        """Logs a rollback, and moves the metrics of the undone steps to their own file.

        Args:
            undone: the state that the run had reached.
            state: the state of the checkpoint `path`.
        """
        if self._metrics is None:
            return
        logger.warning(
            f"rolled back to {path}; continuing at step {state.step + 1} with other samples: "
            f"skipping {undone.samples - state.samples:,} from position {state.samples:,} on "
            f"({loss_spikes.FILE_NAME})"
        )
        self.events.write(
            "rollback",
            step=undone.step,
            to=state.step,
            path=path,
            first=state.samples,
            last=undone.samples - 1,
        )
        self._metrics.roll_back(to_step=state.step, from_step=undone.step)

    def log_save(self, result: SaveResult) -> None:
        """Logs a complete checkpoint."""
        self.info(
            f"saved {result.path} in {result.seconds:.1f} s "
            f"(training blocked for {result.stalled:.2f} s)"
        )
        self.events.write(
            "save",
            step=retention.step_number(result.path),
            path=result.path,
            seconds=result.seconds,
            blocking_seconds=result.stalled,
        )


def _versions() -> dict[str, str]:
    libraries = {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")
    }
    return {"megatrain": __version__, "python": platform.python_version(), **libraries}
