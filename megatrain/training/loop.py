"""A run from config to finish: the loop, and what happens every n steps around it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Literal, NoReturn

import torch
import torch.distributed as dist

from megatrain.checkpoint import resume
from megatrain.checkpoint.retention import restore_best, write_best
from megatrain.checkpoint.train_state import TrainState
from megatrain.config.loader import Config
from megatrain.data.text_files import is_supported
from megatrain.distributed.activity import RankActivity, WorldGroup
from megatrain.distributed.env import RankEnv
from megatrain.errors import UserError
from megatrain.telemetry.metrics import Value
from megatrain.training import rollback
from megatrain.training.loss_spikes import first_to_undo, is_noticed, spike_since, spike_threshold
from megatrain.training.preflight import check_start
from megatrain.training.resume_check import ResumeCheck, remember_loss
from megatrain.training.run_logger import describe_nonfinite
from megatrain.training.setup import TrainComponents, early_stop, set_up
from megatrain.training.step_runner import StepReport
from megatrain.training.step_timer import timed
from megatrain.training.task import PretrainingTask, Task
from megatrain.training.task_classification import ClassificationTask
from megatrain.training.task_sft import SFTTask


def pretrain(config: Config, place: RankEnv, activity: RankActivity | None = None) -> None:
    """The whole run on one rank."""
    _train(config, place, PretrainingTask(), activity or RankActivity())


def finetune(config: Config, place: RankEnv, activity: RankActivity | None = None) -> None:
    """The same with chats, pairs of answers or labels for data."""
    _train(config, place, task_of(config, "finetune"), activity or RankActivity())


VERBS: dict[str, Callable[[Config, RankEnv, RankActivity], object]] = {
    "pretrain": pretrain,
    "finetune": finetune,
}
"""Each verb's work on a rank."""


def command_of(config: Config) -> Literal["pretrain", "finetune"]:
    """Which verb a config is written for: a task of finetuning's says it, and data that are text and no indexed dataset."""
    data = config.data.train if isinstance(config.data.train, str) else ""
    return "finetune" if config.task != "sft" or is_supported(data) else "pretrain"


def task_of(config: Config, verb: str) -> Task:
    """What a run of the verb learns from."""
    if verb == "pretrain":
        return PretrainingTask()
    return (
        ClassificationTask()
        if config.task in ("classification", "token-classification")
        else SFTTask()
    )


def _train(config: Config, place: RankEnv, task: Task, activity: RankActivity) -> None:
    if place.rank == 0:
        activity.set_phase("checking the config and making the data")
        check_start(config, task, place.world_size)
    if place.world_size > 1:
        with activity.collective("barrier", WorldGroup(range(place.world_size))):
            dist.barrier()  # what rank 0 makes of the data is there
    activity.set_phase("building the model")
    _Run(set_up(config, place, task, activity)).run()


class _Run:
    """The loop over steps. All ranks are at the same place of it."""

    def __init__(self, parts: TrainComponents) -> None:
        self.parts, self.config, self.runner = parts, parts.config, parts.runner
        self.saver, self.journal, self.early = parts.saver, parts.journal, parts.early
        self.progress, self.watch, self.activity = (
            parts.progress,
            parts.watch,
            parts.runner.mesh.activity,
        )
        self.stop_asked, self.saved = False, set[int]()

    def run(self) -> None:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._ask_to_stop)
        train = self.config.train
        last = min(
            self.config.steps,
            train.exit_after_step if train.exit_after_step is not None else self.config.steps,
        )
        self.journal.begin(self.parts.asked, self.progress, last=last)
        try:
            if self.progress.step == 0:
                self._first()
            while self.progress.step < last and not self._is_over():
                self._step(last)
                if self._agree_to_stop() and self.progress.step < last:
                    self._save()
                    self._finish_saving()
                    self.journal.stopped(self.progress)
                    break
            self._finish_saving()
        except Exception as error:
            self.journal.failed(error, self.progress)
            raise
        finally:
            self.parts.train.close()
            if self.parts.valid is not None:
                self.parts.valid.loader.close()
            self.journal.close()
        self.journal.finish(
            self.progress,
            self.early.words() if self.early is not None and self._is_over() else None,
        )

    def _first(self) -> None:
        """Step 0: the model as initialised, evaluated if asked; saved when no step is to follow."""
        if self.parts.valid is not None:
            self.journal.write(0, {**self._evaluate(), "tokens": 0})
        if self.config.steps == 0:
            self._save()

    def _step(self, last: int) -> None:
        train, step = self.config.train, self.progress.step + 1
        shown = step % train.log_every == 0 or step == last
        self.activity.begin_step(step)
        with self.parts.tracer.watch(step), timed(self.runner.executor, wanted=shown) as stopwatch:
            started = time.perf_counter()
            self.activity.set("loading data")
            report = self.runner.train_step(
                step,
                self.parts.train.microbatches(self.progress.samples // train.global_batch_size),
            )
            seconds = time.perf_counter() - started
        self.activity.set_phase("what follows the step")
        self.watch.check(step, report.loss)
        self.progress = self._after(report)
        if not report.applied:
            self.journal.skipped(report, self.progress)
        values, figures = self.journal.measured(report, self.progress, seconds), dict[str, float]()
        if shown:
            self.journal.show_step(step, report, seconds, parts=stopwatch.seconds())
            with self.activity.collective("measuring memory in the", self.runner.mesh.world):
                values.update(self.parts.gauge.measure())
        undo = first_to_undo(self.progress, self.config.stability)
        if undo and self._go_back(undo, values):
            return
        if self.parts.valid is not None and (step % self.config.eval.every == 0 or step == last):
            figures = self._evaluate()
            values.update(figures)
        best = (
            self.early is not None
            and step % self.config.eval.every == 0
            and self.early.add(step, figures)
        )
        saves = (
            step == last
            or best
            or self._is_over()
            or (self.config.checkpoint.save_every and step % self.config.checkpoint.save_every == 0)
        )
        if saves and self.progress.bad_steps < self.config.stability.max_nonfinite_steps:
            self._save()
        if self.saver.stalled:
            values["save_stall_seconds"], self.saver.stalled = self.saver.stalled, 0.0
        self.journal.write(step, values)
        if self.progress.bad_steps >= self.config.stability.max_nonfinite_steps:
            self._give_up(report)
        if best or (saves and not self.config.checkpoint.async_save):
            self._finish_saving()
        if best and self.journal.is_kept:
            write_best(
                self.parts.folder,
                step=step,
                metric=self.config.eval.early_stopping_metric,
                value=figures[self.config.eval.early_stopping_metric],
            )
            self.journal.events.write(
                "best",
                step=step,
                metric=self.config.eval.early_stopping_metric,
                value=figures[self.config.eval.early_stopping_metric],
            )

    def _after(self, report: StepReport) -> TrainState:
        """Where the run stands after one more step."""
        before, train = self.progress, self.config.train
        limit = spike_threshold(before.losses, self.config.stability)
        losses = remember_loss(
            before.losses,
            report.loss,
            at_least=self.config.stability.spike_window
            if self.config.stability.on_loss_spike != "off"
            else 0,
        )
        bad_steps = 0 if report.applied else before.bad_steps + (not report.rescaled)
        after = TrainState(
            before.step + 1,
            before.tokens + self.config.tokens_per_step,
            before.updates + report.applied,
            bad_steps,
            losses,
            loss_scaling=self.runner.optimizer.loss_scaling,
            samples=before.samples + train.global_batch_size,
            spike_since=spike_since(before, report.loss, limit),
        )
        if limit is not None and is_noticed(after, self.config.stability):
            self.journal.spiked(after, limit)
        return after

    def _go_back(self, since: int, values: Mapping[str, Value]) -> bool:
        """Undo the steps from `since` on and pass over their samples; whether there was a checkpoint to go back to."""
        self.activity.set_phase("going back to a checkpoint")
        self._finish_saving()
        reached, folder = self.progress, self.parts.folder
        target = rollback.find(
            folder,
            since=since,
            own=lambda step: step <= self.parts.progress.step or step in self.saved,
            hashes=self.config.checkpoint.verify == "full",
            world=self.runner.mesh.world,
        )
        if target.path is None:
            self.journal.stays(reached, target.passed)
            return False
        if target.times >= self.config.stability.max_rollbacks:
            raise UserError(
                f"the run went back to {target.path} {target.times} times (stability.max_rollbacks) and has trouble again at step {since}: lower "
                "optimizer.lr, take an older checkpoint with checkpoint.resume=FOLDER, or look at the data that skipped_samples.jsonl names"
            )
        back = resume.load(
            target.path,
            optimizer=self.runner.optimizer,
            global_batch_size=self.config.train.global_batch_size,
            mesh=self.runner.mesh,
        )
        back = rollback.pass_over(folder, back, world=self.runner.mesh.world)
        self.journal.write(reached.step, values)
        if self.journal.is_kept:
            rollback.commit(
                folder, back=back, noticed=reached, since=since, loader=self.parts.train
            )
        self.journal.went_back(reached, back, target.path)
        self.progress = back._replace(samples=reached.samples)
        self.watch = ResumeCheck(target.path, self.progress, margin=0)
        self.early = early_stop(self.config, folder, self.runner.mesh, self.progress)
        if self.early is not None and self.journal.is_kept:
            restore_best(
                folder,
                step=self.early.best_step,
                metric=self.config.eval.early_stopping_metric,
                value=self.early.best,
            )
        return True

    def _give_up(self, report: StepReport) -> NoReturn:
        self._finish_saving()
        where = self.runner.locate_nonfinite()
        bad = self.progress.bad_steps
        raise UserError(
            f"{bad} steps in a row (stability.max_nonfinite_steps) had a non-finite {describe_nonfinite(report)}; {where}"
        )

    def _evaluate(self) -> dict[str, float]:
        """The loss, and what the task measures beside it."""
        valid = self.parts.valid
        assert valid is not None
        self.activity.set_phase("evaluating")
        with self.parts.task.measure(self.runner, self.parts.folder) as measured:
            loss, measures = self.runner.evaluate(valid.loader.microbatches, valid.batches)
        figures = {f"valid_{name}": value for name, value in measures.items()} | measured
        self.journal.show_evaluation(self.progress.step, loss, figures)
        return {"valid_loss": loss, **figures}

    def _save(self) -> None:
        self.activity.set_phase("saving")
        step, back_to = self.progress.step, None
        if self.config.stability.on_loss_spike == "rollback":
            back_to = rollback.newest_from_before(self.progress.spike_since or step + 1)
        self.saved.add(step)
        self.journal.saved(
            self.saver.save(
                self.progress, prune=self.watch.has_seen_an_update(step), rollback_step=back_to
            )
        )

    def _finish_saving(self) -> None:
        self.activity.set_phase("waiting for the checkpoint's writer")
        self.journal.saved(self.saver.finish())

    def _is_over(self) -> bool:
        return self.early is not None and self.early.is_over

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_asked = True

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop: all stop after the same step. The same message says whether any rank still writes a checkpoint."""
        flags = torch.tensor(
            [int(self.stop_asked), int(self.saver.is_writing)], device=self.parts.device
        )
        with self.activity.collective("agreeing in the", self.runner.mesh.world):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            stop, anyone_writes = flags.tolist()
        self.journal.saved(self.saver.proceed(anyone_writes=bool(anyone_writes)))
        return bool(stop)
