"""What a run says and writes down about itself: console lines, metrics.jsonl, TensorBoard events, its picture. Rank 0 keeps it.

Every rank has a journal, so that the loop need not ask who it is: those of other ranks write nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatrain.checkpoint.save import Progress
from megatrain.checkpoint.saver import Saved
from megatrain.config import Config, to_yaml
from megatrain.models.architecture import Architecture
from megatrain.place import Place
from megatrain.train import console
from megatrain.train.checks import run_header
from megatrain.train.flops import flops_per_token, peak_flops
from megatrain.train.metrics import MetricsLog, Value
from megatrain.train.picture import draw_loss
from megatrain.train.trainer import StepReport

logger = logging.getLogger("megatrain")

_LEFT = ("checkpoints", "metrics.jsonl", "loss.png", "tensorboard")


class Journal:
    """A run's journal, opened once `begin` has been called, which needs to know where the run goes on."""

    def __init__(self, config: Config, architecture: Architecture, place: Place, device: torch.device) -> None:
        self.folder, self.is_kept = Path(config.run.output_dir), place.rank == 0
        self._config, self._architecture, self._world_size = config, architecture, place.world_size
        self._gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        self._flops = flops_per_token(architecture.config, sequence_length=config.data.sequence_length, frozen=config.lora.rank > 0,
                                      head=architecture.classifier is None)  # fmt: skip
        self._peak = peak_flops(self._gpu, config.train.dtype) if self._gpu else None
        self._metrics: MetricsLog | None = None

    def say(self, lines: Iterable[str]) -> None:
        """Indented, as what belongs to the header."""
        for words in lines if self.is_kept else ():
            logger.info(f"  {words}")

    def warn(self, lines: Iterable[str]) -> None:
        for words in lines if self.is_kept else ():
            logger.warning(f"  {words}")

    def open(self, lines: Iterable[str]) -> None:
        """The run's header, and what there is to say of its data and its beginning."""
        if self.is_kept:
            logger.info(run_header(self._config, self._architecture, self._world_size, self._gpu or "cpu"))
        self.say(lines)

    def begin(self, asked: Config, progress: Progress, *, last: int) -> None:
        """The loop begins after `progress.step` and goes on to step `last`."""
        if not self.is_kept:
            return
        (self.folder / "config.yaml").write_text(to_yaml(asked), encoding="utf-8")
        self._metrics = MetricsLog(self.folder, after_step=progress.step)
        if progress.step >= last > 0:
            logger.info(f"nothing left to train: step {progress.step} is done, and the run ends after step {last}")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """A line of metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(step, values)

    def measured(self, report: StepReport, progress: Progress, seconds: float) -> dict[str, Value]:
        """A step as metrics.jsonl has it."""
        rate = self._config.tokens_per_step / seconds
        per_rank = rate * self._flops / self._world_size
        return {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr, "tokens": progress.tokens,
                "seconds": seconds, "tokens_per_second": rate, "tflops_per_rank": per_rank / 1e12,
                "mfu": per_rank / self._peak if self._peak else None, "skipped": not report.applied, **report.measures}  # fmt: skip

    def show_step(self, step: int, report: StepReport, seconds: float) -> None:
        if self.is_kept:
            rate = self._config.tokens_per_step / seconds
            logger.info(console.step_line(console.Step(
                step=step, steps=self._config.steps, loss=report.loss, grad_norm=report.grad_norm, lr=report.lr,
                tokens_per_second=rate, flops_per_second=rate * self._flops, seconds_per_step=seconds)))  # fmt: skip

    def show_evaluation(self, step: int, loss: float, figures: Mapping[str, float]) -> None:
        if self.is_kept:
            logger.info(console.evaluation_line(step=step, steps=self._config.steps, loss=loss, measured=figures))

    def skipped(self, report: StepReport, progress: Progress) -> None:
        if self.is_kept:
            logger.warning(f"step {progress.step}: non-finite {bad_part(report)}, skipped ({progress.bad_steps} in a row)")

    def saved(self, saved: Saved | None) -> None:
        if saved is not None and self.is_kept:
            logger.info(f"saved {saved.path} ({saved.seconds:.1f} s, for {saved.stalled:.2f} s of which training stood still)")

    def stopped(self, progress: Progress) -> None:
        if self.is_kept:
            logger.info(f"stopped by a signal after step {progress.step}; start the same command to go on")

    def finish(self, words: str | None) -> None:
        """After the loop: `words` says why, where it ended before its last step."""
        if not self.is_kept:
            return
        if words is not None:
            logger.info(words)
        draw_loss(self.folder, title=self._config.run_name)
        left = [name for name in _LEFT if (self.folder / name).exists()]
        logger.info(f"everything is in {self.folder}: {', '.join(left)}")

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()


def bad_part(report: StepReport) -> str:
    """What is not finite in a step that was skipped."""
    return "gradient" if math.isfinite(report.loss) else "loss"
