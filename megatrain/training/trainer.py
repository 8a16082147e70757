"""A training run on one rank: the loop over steps, and what callbacks may do."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from megatrain.checkpoint.checkpointer import SaveResult
from megatrain.checkpoint.train_state import TrainState
from megatrain.config.loader import Config
from megatrain.distributed.activity import RankActivity, WorldGroup
from megatrain.distributed.env import RankEnv
from megatrain.distributed.process_group import current_env, process_group
from megatrain.telemetry.metrics import Value
from megatrain.training.callback import Callback
from megatrain.training.loss_spikes import newest_step_before
from megatrain.training.preflight import check_start
from megatrain.training.resume_check import append_loss
from megatrain.training.run_logger import STOPPED_BY_SIGNAL
from megatrain.training.select_task import select_task
from megatrain.training.setup import TrainComponents, set_up
from megatrain.training.step_runner import StepReport
from megatrain.training.task import Task

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class TrainResult(NamedTuple):
    """The outcome of a run, the same on all ranks but for the metrics of time.

    Attributes:
        step: the last step.
        metrics: the line of metrics.jsonl about the last step of this attempt; empty without one.
        losses: the finite losses of the last steps, oldest first.
        output_dir: the folder of the run.
        checkpoint: the newest checkpoint; None if there is none.
        stop_reason: the reason why the run ended before its last step; None if it did not.
    """

    step: int
    metrics: dict[str, Value]
    losses: tuple[float, ...]
    output_dir: Path
    checkpoint: Path | None
    stop_reason: str | None


class Trainer:
    """One training run, in a process that a launcher started or in a single process.

    All ranks of the run create a trainer and call its methods together. torchrun, srun, deepspeed
    and accelerate are supported as launchers; without one the process is the only rank.

    Attributes:
        config: the settings, with the number of steps and the schedule filled in.
        callbacks: the built-in callbacks that the settings enable, then those given.
        state: the state after the last step; `state.step` is 0 before the first.
        last_step: the step after which this attempt ends.
        output_dir: the folder of the run.
        runner: runs steps and evaluations on this rank's stages; has the model as `runner.stage`.
        mesh: the process mesh, with the rank and the groups of this process.

    Example:
        >>> trainer = Trainer(load_config("run.yaml"), callbacks=[LogGradientNorms()])
        >>> trainer.train().losses[-1]
    """

    def __init__(
        self,
        config: Config,
        callbacks: Sequence[Callback] = (),
        *,
        command: Literal["pretrain", "finetune"] | None = None,
        env: RankEnv | None = None,
        activity: RankActivity | None = None,
    ) -> None:
        """Builds the model, and loads the checkpoint to resume from.

        Args:
            config: the settings of the run.
            callbacks: called after the built-in ones, in this order.
            command: pretraining reads indexed datasets, finetuning texts; None decides by the data.
            env: the rank; None reads the variables of the launcher.
            activity: records what this rank is doing, for a watchdog.

        Raises:
            ConfigError, DataError, CheckpointError: the settings, data or checkpoint are invalid.
        """
        activity = activity or RankActivity()
        self._resources = contextlib.ExitStack()
        self._is_embedded = not dist.is_initialized()
        try:
            env = env or current_env()
            self._resources.enter_context(process_group(env))
            components = _build(config, env, select_task(config, command), activity)
        except BaseException:
            self._resources.close()
            raise
        self.activity = activity
        self.requested_config, self.config = components.requested, components.config
        self.callbacks: list[Callback] = [*components.callbacks, *callbacks]
        self.state, self.output_dir = components.state, components.folder
        self.mesh, self.runner, self.task = components.mesh, components.runner, components.task
        self.train_data, self.valid_data = components.train, components.valid
        self.checkpointer, self.run_logger = components.checkpointer, components.run_logger
        exit_step = self.config.train.exit_after_step
        self.last_step = min(self.config.steps, exit_step or self.config.steps)
        self.stop_reason: str | None = None
        self._stop_request: str | None = None
        self._has_signal = False
        self._resumed_step = self.state.step
        self._loaded_step = None if components.resumed_from is None else self.state.step
        self._checkpoint, self._metrics = components.resumed_from, dict[str, Value]()
        self._saved_steps: set[int] = set()

    # -- the loop --------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Trains to the last step, or until a signal or a callback stops the run.

        Returns:
            The outcome of the run.

        Raises:
            UserError: the run cannot continue, such as after too many non-finite steps.
        """
        with self._attempt():
            self._begin()
            while self.state.step < self.last_step and self.stop_reason is None:
                step = self.state.step + 1
                self.activity.begin_step(step)
                self._call("on_step_begin", step)
                report, metrics = self._train_step(step)
                self.activity.set_phase("running callbacks after the step")
                if self._end_step(report, metrics):
                    self.log(metrics)
                self._agree_to_stop()
            self.finish_saving()
            self._call("on_train_end")
        self.run_logger.finish(self.state, self.stop_reason)
        return TrainResult(
            self.state.step,
            self._metrics,
            self.state.losses,
            self.output_dir,
            self._checkpoint,
            self.stop_reason,
        )

    def _begin(self) -> None:
        self._call("on_train_begin")
        self.stop_reason = self._stop_request
        if self.state.step == 0:
            self._call("on_initial_state")

    def _train_step(self, step: int) -> tuple[StepReport, dict[str, Value]]:
        started = time.perf_counter()
        self.activity.set("loading data")
        batch_number = self.state.samples // self.config.train.global_batch_size
        report = self.runner.train_step(step, self.train_data.microbatches(batch_number))
        seconds = time.perf_counter() - started
        self.state = self._advance(report)
        return report, self.run_logger.step_metrics(report, self.state, seconds)

    def _advance(self, report: StepReport) -> TrainState:
        """Returns the state after a step."""
        before, stability = self.state, self.config.stability
        keep_losses = stability.spike_window if stability.on_loss_spike != "off" else 0
        is_bad = not report.applied and not report.rescaled
        return TrainState(
            before.step + 1,
            before.tokens + self.config.tokens_per_step,
            before.updates + report.applied,
            before.bad_steps + is_bad if not report.applied else 0,
            append_loss(before.losses, report.loss, keep=keep_losses),
            loss_scaling=self.runner.optimizer.loss_scaling,
            samples=before.samples + self.config.train.global_batch_size,
        )

    def _end_step(self, report: StepReport, metrics: dict[str, Value]) -> bool:
        """Calls the callbacks after a step; returns False if one of them undid it."""
        step = self.state.step
        for callback in self.callbacks:
            callback.on_step_end(self, report, metrics)
            if self.state.step != step:
                return False
        return True

    def _agree_to_stop(self) -> None:
        """Stops all ranks after the same step, if a signal or a callback asks any of them to.

        The same all-reduce finds out whether a rank still writes a checkpoint.
        """
        flags = torch.tensor(
            [self._has_signal, self.checkpointer.is_writing, self.stop_requested],
            dtype=torch.int64,
            device=self.runner.device,
        )
        with self.activity.collective("agreeing in the", self.mesh.world):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            signalled, anyone_writes, stop = (bool(flag) for flag in flags.tolist())
        self._published(self.checkpointer.proceed(anyone_writes=anyone_writes))
        if stop:
            self.stop_reason = self._stop_request or "stopped by a callback of another rank"
        elif signalled and self.state.step < self.last_step:
            self.stop_reason = STOPPED_BY_SIGNAL
        if self.stop_reason is not None:
            self.save()

    @contextlib.contextmanager
    def _attempt(self) -> Iterator[None]:
        """Handles signals, opens and closes the run's files, and records an error."""
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        self.run_logger.begin(self.requested_config, self.state, last_step=self.last_step)
        try:
            yield
        except Exception as error:
            self.run_logger.log_failure(error, self.state)
            raise
        finally:
            self.train_data.close()
            if self.valid_data is not None:
                self.valid_data.loader.close()
            self.run_logger.close()
            self._resources.close()
            # Ranks of a launcher end now, and ignore signals that arrive meanwhile.
            for number, handler in handlers.items() if self._is_embedded else ():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._has_signal = True

    def _call(self, hook: str, *args: object) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    # -- for callbacks ---------------------------------------------------------------------------

    def is_due(self, step: int, every: int) -> bool:
        """Returns True at multiples of `every` (0: none), and at the last step of the attempt."""
        return step == self.last_step or (every > 0 and step % every == 0)

    def request_stop(self, reason: str) -> None:
        """Ends the run after this step, with a checkpoint. One rank suffices to stop all ranks."""
        self._stop_request = reason

    @property
    def stop_requested(self) -> bool:
        """True if a callback has requested the end of the run on this rank."""
        return self._stop_request is not None

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics of the validation data; all ranks call it.

        The keys are `valid_loss` and the metrics of the task. Requires `data.valid` or
        `data.split`.
        """
        valid = self.valid_data
        assert valid is not None, "a run without validation data cannot be evaluated"
        self.activity.set_phase("evaluating")
        with self.task.measure(self.runner, self.output_dir) as measured:
            loss, measures = self.runner.evaluate(valid.loader.microbatches, valid.batches)
        metrics = {f"valid_{name}": value for name, value in measures.items()} | measured
        self.run_logger.log_evaluation(self.state.step, loss, metrics)
        metrics = {"valid_loss": loss, **metrics}
        self._call("on_evaluate", metrics)
        return metrics

    def log(self, metrics: Mapping[str, Value]) -> None:
        """Writes the metrics of the current step to metrics.jsonl and the exporters."""
        self._metrics = dict(metrics)
        self.run_logger.write(self.state.step, metrics)
        self._call("on_log", metrics)

    def save(self) -> None:
        """Starts to save the current state, unless it is saved already; all ranks call it."""
        step = self.state.step
        if step in self._saved_steps:
            return
        self._saved_steps.add(step)
        self.activity.set_phase("saving")
        rollback_step = None
        if self.config.stability.on_loss_spike == "rollback":
            rollback_step = newest_step_before(self.state.spike_since or step + 1)
        # Older checkpoints stay until a loss has shown the first update after a load.
        is_proven = self._loaded_step is None or step > self._loaded_step + 1
        self._published(
            self.checkpointer.save(self.state, prune=is_proven, rollback_step=rollback_step)
        )

    def finish_saving(self) -> None:
        """Waits until the checkpoint that is being written is complete; all ranks call it."""
        self.activity.set_phase("waiting for the checkpoint to be written")
        self._published(self.checkpointer.finish())

    def _published(self, result: SaveResult | None) -> None:
        if result is not None:
            self._checkpoint = result.path
            self.run_logger.log_save(result)
            self._call("on_save", result.path)

    def is_own_checkpoint(self, step: int) -> bool:
        """Returns True if this run resumed from, or wrote, the checkpoint of `step`."""
        return step <= self._resumed_step or step in self._saved_steps

    def set_state_after_rollback(self, state: TrainState, undone: TrainState) -> None:
        """Continues from an earlier state whose weights have been loaded."""
        self.state = state
        self._saved_steps = {step for step in self._saved_steps if step <= state.step}
        self._loaded_step = state.step
        self._call("on_rollback", undone)


def _build(config: Config, env: RankEnv, task: Task, activity: RankActivity) -> TrainComponents:
    """Checks the config and prepares the data on rank 0, then builds the components."""
    if env.rank == 0:
        activity.set_phase("checking the config and preparing the data")
        check_start(config, task, env.world_size)
    if env.world_size > 1:
        with activity.collective("barrier", WorldGroup(range(env.world_size))):
            dist.barrier()  # rank 0 has prepared the data
    activity.set_phase("building the model")
    return set_up(config, env, task, activity)
