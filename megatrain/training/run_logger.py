"""What a run says and writes down about itself: console lines, metrics.jsonl, events.jsonl, TensorBoard events, its picture.

Rank 0 keeps it. Every rank has a journal, so that the loop need not ask who it is: those of other ranks write nothing but their
own figures into their own log.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import platform
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatrain import __version__
from megatrain.checkpoint import retention
from megatrain.checkpoint.checkpointer import SaveResult
from megatrain.checkpoint.train_state import TrainState
from megatrain.config.loader import Config, to_dict, to_yaml
from megatrain.distributed import device as device_module
from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.env import RankEnv, attempt
from megatrain.distributed.errors import is_lost_connection
from megatrain.distributed.mesh import ProcessMesh
from megatrain.models.counts import flops_per_token, peak_flops
from megatrain.planner.run_spec import RunSpec
from megatrain.telemetry import console
from megatrain.telemetry.events import EventLog
from megatrain.telemetry.exporters import Exporters
from megatrain.telemetry.metrics import MetricsLog, Value
from megatrain.telemetry.plots import loss_name, plot_loss
from megatrain.telemetry.rank_log import rank_json_log
from megatrain.training import rollback
from megatrain.training.loss_spikes import SpikeThreshold
from megatrain.training.run_plan import run_header
from megatrain.training.step_runner import StepReport

logger = logging.getLogger("megatrain")

_LEFT = (
    "checkpoints",
    "metrics.jsonl",
    "events.jsonl",
    rollback.FILE_NAME,
    "loss.png",
    "tensorboard",
)


class RunLogger:
    """A run's journal, opened once `begin` has been called, which needs to know where the run goes on."""

    def __init__(self, spec: RunSpec, place: RankEnv, device: torch.device) -> None:
        config, architecture = spec.config, spec.model
        self._spec = spec
        self.folder, self.is_kept = Path(config.run.output_dir), place.rank == 0
        self._config, self._world_size = config, place.world_size
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
        self._device, self._resumes, self._own_place = device, dict[str, Any](), dict[str, int]()
        self.events = EventLog(self.folder if self.is_kept else None)

    def say(self, lines: Iterable[str]) -> None:
        """Indented, as what belongs to the header."""
        for words in lines if self.is_kept else ():
            logger.info(f"  {words}")

    def warn(self, lines: Iterable[str]) -> None:
        for words in lines if self.is_kept else ():
            logger.warning(f"  {words}")

    def open(self, lines: Iterable[str], *, mesh: ProcessMesh, path: Path | None, why: str) -> None:
        """The run's header, what there is to say of its data, and why it begins from checkpoint `path` or from none. All ranks call it."""
        if self.is_kept:
            logger.info(run_header(self._spec, self._gpu or "cpu"))
        self.say([*lines, why])
        self._resumes = {} if path is None else {"from": path, "why": why}
        hosts = gather_objects(socket.gethostname(), mesh.world)
        p = self._config.parallel
        layout = {
            "tensor": mesh.tensor.size,
            "pipeline": mesh.pipeline.size,
            "data": mesh.data.size,
            "zero": p.zero,
            "schedule": p.schedule,
        }
        self.events.write(
            "start",
            ranks=self._world_size,
            hosts=sorted(set(hosts)),
            device=self._gpu or "cpu",
            layout=layout,
            versions=_versions(),
            attempt=attempt(os.environ),
            resume=self._config.checkpoint.resume,
            why=None if self._resumes else why,
        )
        self._own_place = {
            "pipeline": mesh.pipeline.rank,
            "data": mesh.data.rank,
            "tensor": mesh.tensor.rank,
        }

    def begin(self, asked: Config, progress: TrainState, *, last: int) -> None:
        """The loop begins after `progress.step` and goes on to step `last`."""
        if not self.is_kept:
            return
        (self.folder / "config.yaml").write_text(to_yaml(asked), encoding="utf-8")
        self._metrics = MetricsLog(self.folder, after_step=progress.step)
        self._exporters = Exporters(
            self._config.run,
            run_name=self._config.run_name,
            log_every=self._config.train.log_every,
            settings=to_dict(self._config),
            run_folder=self.folder,
            after_step=progress.step,
        )
        if self._resumes:
            self.events.write("resume", step=progress.step, **self._resumes)
        if progress.step >= last > 0:
            logger.info(
                f"nothing left to train: step {progress.step} is done, and the run ends after step {last}"
            )

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """A line of metrics.jsonl, and the same to wherever else the config says."""
        if self._metrics is not None and self._exporters is not None:
            self._metrics.write(step, values)
            self._exporters.write(step, values)

    def measured(
        self, report: StepReport, progress: TrainState, seconds: float
    ) -> dict[str, Value]:
        """A step as metrics.jsonl has it."""
        rate = self._config.tokens_per_step / seconds
        per_rank = rate * self._flops / self._world_size
        return {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "tokens": progress.tokens,
            "seconds": seconds,
            "tokens_per_second": rate,
            "tflops_per_rank": per_rank / 1e12,
            "mfu": per_rank / self._peak if self._peak else None,
            "skipped": not report.applied,
            **report.measures,
            **(
                {} if progress.loss_scaling is None else {"loss_scale": progress.loss_scaling.scale}
            ),
        }

    def show_step(
        self, step: int, report: StepReport, seconds: float, *, parts: Mapping[str, float]
    ) -> None:
        """`parts` is how this rank spent the step."""
        if (own := rank_json_log()) is not None:
            own.step = step
            own.write(
                "INFO",
                "figures",
                **self._own_place,
                seconds=seconds,
                **parts,
                peak_memory=device_module.peak_memory(self._device).size,
            )
        if self.is_kept:
            rate = self._config.tokens_per_step / seconds
            logger.info(
                console.step_line(
                    console.StepLine(
                        step=step,
                        steps=self._config.steps,
                        loss=report.loss,
                        grad_norm=report.grad_norm,
                        lr=report.lr,
                        tokens_per_second=rate,
                        flops_per_second=rate * self._flops,
                        seconds_per_step=seconds,
                    )
                )
            )

    def show_evaluation(self, step: int, loss: float, figures: Mapping[str, float]) -> None:
        if self.is_kept:
            logger.info(
                console.evaluation_line(
                    step=step, steps=self._config.steps, loss=loss, measured=figures
                )
            )

    def skipped(self, report: StepReport, progress: TrainState) -> None:
        if self.is_kept and report.rescaled:
            logger.info(
                f"step {progress.step}: gradients are too large for fp16 at this loss scale, skipped; a lower one is tried"
            )
        elif self.is_kept:
            logger.warning(
                f"step {progress.step}: {report.reason}, skipped ({progress.bad_steps} in a row)"
            )
            last = progress.samples - 1
            self.events.write(
                "skip",
                step=progress.step,
                what=report.reason,
                in_a_row=progress.bad_steps,
                first=last + 1 - self._config.train.global_batch_size,
                last=last,
            )

    def spiked(self, progress: TrainState, limit: SpikeThreshold) -> None:
        if self.is_kept:
            stability, loss = self._config.stability, progress.losses[-1]
            logger.warning(
                f"step {progress.step}: the loss has spiked since step {progress.spike_since} and is {loss:.3f}; above {limit.loss:.3f} is a spike, the median "
                f"{limit.median:.3f} of the last {stability.spike_window} and {stability.spike_threshold:g} times their deviation {limit.deviation:.3f} (stability.on_loss_spike={stability.on_loss_spike})"
            )
            self.events.write(
                "spike",
                step=progress.step,
                began=progress.spike_since,
                loss=loss,
                limit=limit.loss,
                median=limit.median,
                deviation=limit.deviation,
            )

    def stays(self, progress: TrainState, passed: Iterable[str]) -> None:
        """No checkpoint is from before what should be undone."""
        if self.is_kept:
            why = "".join(f"; {text}" for text in passed)
            logger.warning(
                f"step {progress.step}: there is no whole checkpoint from before to go back to{why}"
            )

    def went_back(self, noticed: TrainState, back: TrainState, path: Path) -> None:
        """From the step at which something was noticed to the one that `back` is after."""
        if self._metrics is None:
            return
        logger.warning(
            f"went back to {path}; step {back.step + 1} comes again with other samples: {noticed.samples - back.samples:,} are passed over, from "
            f"position {back.samples:,} on ({rollback.FILE_NAME})"
        )
        self.events.write(
            "rollback",
            step=noticed.step,
            to=back.step,
            path=path,
            first=back.samples,
            last=noticed.samples - 1,
        )
        self._metrics.roll_back(to_step=back.step, from_step=noticed.step)

    def saved(self, saved: SaveResult | None) -> None:
        if saved is not None and self.is_kept:
            logger.info(
                f"saved {saved.path} ({saved.seconds:.1f} s, for {saved.stalled:.2f} s of which training stood still)"
            )
            self.events.write(
                "save",
                step=retention.step_number(saved.path),
                path=saved.path,
                seconds=saved.seconds,
                stalled=saved.stalled,
            )

    def stopped(self, progress: TrainState) -> None:
        if self.is_kept:
            logger.info(
                f"stopped by a signal after step {progress.step}; start the same command to go on"
            )
            self.events.write("stop", step=progress.step, why="a signal")

    def failed(self, error: Exception, progress: TrainState) -> None:
        """The run ends, for a reason of this rank's. Of a rank that is gone, who watches the ranks writes (events.write_failure)."""
        if not is_lost_connection(error):
            self.events.write(
                "fail", step=progress.step, error=f"{type(error).__name__}: {error}"[:2000]
            )

    def finish(self, progress: TrainState, words: str | None) -> None:
        """After the loop: `words` says why, where it ended before its last step."""
        if not self.is_kept:
            return
        if words is not None:
            logger.info(words)
        if words is not None or progress.step >= self._config.steps:
            self.events.write("finish", step=progress.step, why=words or "all steps are done")
        elif progress.step == self._config.train.exit_after_step:
            self.events.write(
                "stop", step=progress.step, why=f"train.exit_after_step={progress.step}"
            )
        plot_loss(
            self.folder,
            title=self._config.run_name,
            loss=loss_name(self._config.task, self._config.classification.problem),
        )
        left = [name for name in _LEFT if (self.folder / name).exists()]
        logger.info(f"everything is in {self.folder}: {', '.join(left)}")

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._exporters is not None:
            self._exporters.close()


def _versions() -> dict[str, str]:
    libraries = {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")
    }
    return {"megatrain": __version__, "python": platform.python_version(), **libraries}


def describe_nonfinite(report: StepReport) -> str:
    """What is not finite in a step that was skipped."""
    return "gradient" if math.isfinite(report.loss) else "loss"
