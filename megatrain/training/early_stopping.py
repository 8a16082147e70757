"""Early stopping: ends a run when the metric of its evaluations has stopped improving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatrain.checkpoint.retention import restore_best, write_best
from megatrain.checkpoint.train_state import TrainState
from megatrain.distributed.collectives import broadcast_object
from megatrain.errors import ConfigError
from megatrain.telemetry import metrics as metrics_file
from megatrain.telemetry.metrics import Value
from megatrain.training.callback import Callback

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepReport
    from megatrain.training.trainer import Trainer

_LOWER_IS_BETTER = ("valid_loss", "valid_mse", "valid_mae")


class EarlyStopping(Callback):
    """Keeps the best checkpoint; stops after `patience` evaluations in a row without a better one.

    Only evaluations at multiples of `every` count: the one after the last step of an attempt would
    make the outcome depend on where the run was interrupted.

    Attributes:
        best_step, best: the step and the metric of the best evaluation; None before the first.
        evaluations_since_best: the number of evaluations after it.
    """

    def __init__(self, *, patience: int, metric: str, every: int) -> None:
        self.patience, self.metric, self.every = patience, metric, every
        self._reset()

    def _reset(self) -> None:
        self.best_step: int | None = None
        self.best: float | None = None
        self.evaluations_since_best = 0
        self._improved = False

    @property
    def is_over(self) -> bool:
        """True once the metric has not improved for `patience` evaluations."""
        return self.evaluations_since_best >= self.patience

    def add(self, step: int, metrics: Mapping[str, object]) -> bool:
        """Adds an evaluation; returns True if it is the best so far. NaN never is.

        Raises:
            ConfigError: the run does not measure the metric.
        """
        value = metrics.get(self.metric)
        if not isinstance(value, int | float):
            known = sorted(name for name in metrics if name.startswith("valid_"))
            raise ConfigError(
                "eval.early_stopping_metric",
                self.metric,
                "must be a metric of this run's evaluations",
                f"use one of {', '.join(known)}",
                fix={"eval.early_stopping_metric": "valid_loss"},
            )
        if self._is_better(float(value)):
            self.best_step, self.best, self.evaluations_since_best = step, float(value), 0
            return True
        self.evaluations_since_best += 1
        return False

    def _is_better(self, value: float) -> bool:
        if value != value:
            return False
        if self.best is None:
            return True
        return value < self.best if self.metric in _LOWER_IS_BETTER else value > self.best

    def message(self) -> str:
        """Returns the reason of the stop."""
        return (
            f"stopped early: {self.metric} has not improved for {self.evaluations_since_best} "
            f"evaluations; its best value is {self.best:.4f}, after step {self.best_step}"
        )

    def on_train_begin(self, trainer: Trainer) -> None:
        """Restores the evaluations of earlier attempts from metrics.jsonl."""
        self._restore(trainer)
        if self.is_over:
            trainer.request_stop(self.message())

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Counts an evaluation."""
        step = trainer.state.step
        if step > 0 and step % self.every == 0:
            self._improved = self.add(step, metrics)

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Saves a new best model, or requests the stop."""
        if self._improved:
            trainer.save()
        elif self.is_over:
            trainer.request_stop(self.message())

    def on_log(self, trainer: Trainer, metrics: Mapping[str, Value]) -> None:
        """Records the best checkpoint once it is complete."""
        if not self._improved:
            return
        self._improved = False
        trainer.finish_saving()
        assert self.best_step is not None
        assert self.best is not None
        if trainer.run_logger.is_main_process:
            write_best(trainer.output_dir, step=self.best_step, metric=self.metric, value=self.best)
        trainer.run_logger.events.write(
            "best", step=self.best_step, metric=self.metric, value=self.best
        )

    def on_rollback(self, trainer: Trainer, undone: TrainState) -> None:
        """Forgets the evaluations that were undone."""
        self._restore(trainer)
        if trainer.run_logger.is_main_process:
            restore_best(
                trainer.output_dir, step=self.best_step, metric=self.metric, value=self.best
            )

    def _restore(self, trainer: Trainer) -> None:
        """Adds the evaluations up to the current step, as rank 0 finds them in metrics.jsonl."""
        self._reset()
        lines = []
        if trainer.run_logger.is_main_process:
            lines = [
                line
                for line in metrics_file.read(trainer.output_dir / metrics_file.FILE_NAME)
                if "valid_loss" in line and 0 < line["step"] <= trainer.state.step
            ]
        for line in broadcast_object(lines, trainer.mesh.world):
            if line["step"] % self.every == 0:
                self.add(line["step"], line)
