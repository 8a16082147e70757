"""Callbacks of every run: console output, evaluation and checkpoints at their steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatrain.telemetry.metrics import Value
from megatrain.training.callback import Callback
from megatrain.training.step_timer import StepTimer

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepReport
    from megatrain.training.trainer import Trainer


class ProgressLogger(Callback):
    """Logs a step every `every` steps, and the last: on the console, and times per rank."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._timer: StepTimer | None = None

    def on_step_begin(self, trainer: Trainer, step: int) -> None:
        """Starts the timer of forwards, backwards and waiting."""
        if trainer.is_due(step, self.every):
            self._timer = StepTimer(trainer.runner.executor)

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Logs the step."""
        if self._timer is not None:
            self._timer.stop()
            seconds = metrics["seconds"]
            assert isinstance(seconds, float)
            trainer.run_logger.log_step(
                trainer.state.step, report, seconds, parts=self._timer.seconds()
            )
            self._timer = None


class Evaluation(Callback):
    """Evaluates the initial model, then every `every` steps and after the last."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_initial_state(self, trainer: Trainer) -> None:
        """Evaluates the initial model."""
        trainer.log({**trainer.evaluate(), "tokens": 0})

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Adds the metrics of an evaluation."""
        if trainer.is_due(trainer.state.step, self.every):
            metrics.update(trainer.evaluate())


class Checkpointing(Callback):
    """Saves every `every` steps (0 disables), after the last step, and when the run stops."""

    def __init__(self, every: int, *, in_background: bool) -> None:
        self.every, self.in_background = every, in_background
        self._is_saving = False

    def on_initial_state(self, trainer: Trainer) -> None:
        """Saves the initial model of a run without steps."""
        if trainer.config.steps == 0:
            trainer.save()

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Starts to save."""
        self._is_saving = trainer.stop_requested or trainer.is_due(trainer.state.step, self.every)
        if self._is_saving:
            trainer.save()
        if trainer.checkpointer.stalled:
            metrics["checkpoint_blocking_seconds"] = trainer.checkpointer.stalled
            trainer.checkpointer.stalled = 0.0

    def on_log(self, trainer: Trainer, metrics: Mapping[str, Value]) -> None:
        """Waits for the checkpoint; only now, so that no checkpoint is ahead of metrics.jsonl."""
        if self._is_saving and not self.in_background:
            trainer.finish_saving()
        self._is_saving = False
