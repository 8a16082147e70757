"""The callback protocol: everything that happens around the training step.

All ranks call all callbacks, in the order of the list `Trainer.callbacks`:

    TraceRecorder    records the actions of some steps          (profile.steps)
    ResumeCheck      checks the first losses after a resume     (checkpoint.resume_loss_tolerance)
    ProgressLogger   writes a line to the console every n steps (train.log_every)
    MemoryMonitor    measures memory every n steps              (train.log_every)
    LossSpikes       warns, or goes back to a checkpoint        (stability.on_loss_spike)
    NonFiniteSteps   ends a run that skips too many steps       (stability.max_nonfinite_steps)
    Evaluation       evaluates every n steps                    (eval.every)
    EarlyStopping    ends a run that no longer improves         (eval.early_stopping_patience)
    Checkpointing    saves every n steps and after the last     (checkpoint.save_every)
    ...              the callbacks that were given to `Trainer`, in their order

One step calls the hooks in this order:

    on_step_begin    of all callbacks
      the step: forwards, backwards, update
    on_step_end      of all callbacks; can cause on_evaluate, on_save or on_rollback
      the metrics are written to metrics.jsonl
    on_log           of all callbacks
      one all-reduce: whether to stop, and whether a checkpoint is complete (on_save)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.checkpoint.train_state import TrainState
from megatrain.telemetry.metrics import Value

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepReport
    from megatrain.training.trainer import Trainer


class Callback:
    """Base class of callbacks, whose hooks do nothing.

    Ranks must stay in step: a hook may call collectives, such as those of `Trainer.save`, only if
    it does so on all ranks. Its decisions must therefore depend on numbers that are equal on all
    ranks: the step, a `StepReport`, the state, the metrics of an evaluation. `seconds` and what
    follows from it differ between ranks.

    Example:
        >>> class LogGradientNorms(Callback):
        ...     def on_train_begin(self, trainer):
        ...         self.norms = []
        ...
        ...     def on_step_end(self, trainer, report, metrics):
        ...         self.norms.append(report.grad_norm)
        ...         metrics["largest_grad_norm"] = max(self.norms)
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Runs once, before the first step of this attempt."""

    def on_initial_state(self, trainer: Trainer) -> None:
        """Runs after `on_train_begin` of all callbacks, if the run starts at step 0."""

    def on_step_begin(self, trainer: Trainer, step: int) -> None:
        """Runs before step `step`, the first of which is 1."""

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Runs after a step, when `trainer.state` is the state after it.

        Args:
            report: the outcome of the step, equal on all ranks.
            metrics: the line of metrics.jsonl; entries that a callback adds are written too.

        A callback that moves `trainer.state` to another step (a rollback) ends the step: the hooks
        of later callbacks are not called, and the callback writes the metrics itself.
        """

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Runs after an evaluation with its metrics, such as `valid_loss`."""

    def on_log(self, trainer: Trainer, metrics: Mapping[str, Value]) -> None:
        """Runs after the metrics of a step were written."""

    def on_save(self, trainer: Trainer, path: Path) -> None:
        """Runs once the checkpoint `path` is complete, which may be some steps after its step."""

    def on_rollback(self, trainer: Trainer, undone: TrainState) -> None:
        """Runs after `trainer.state` went back to a checkpoint from the state `undone`."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Runs once, after the last step, when all checkpoints are complete; not after an error."""
