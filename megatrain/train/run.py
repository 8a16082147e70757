"""A run from config to finish: the loop, and what happens every n steps around it."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from megatrain.checkpoint.best import write_best
from megatrain.checkpoint.save import Progress
from megatrain.config import Config
from megatrain.errors import UserError
from megatrain.place import Place
from megatrain.rank import Target
from megatrain.train.checks import check_without_ranks
from megatrain.train.classifying import Classification
from megatrain.train.finetuning import Finetuning
from megatrain.train.journal import bad_part
from megatrain.train.parts import Parts, make_parts
from megatrain.train.plausible import remember
from megatrain.train.stopwatch import timed
from megatrain.train.tasks import Pretraining, Task
from megatrain.train.trainer import StepReport


def pretrain(config: Config, place: Place) -> None:
    """The whole run on one rank."""
    _train(config, place, Pretraining())


def finetune(config: Config, place: Place) -> None:
    """The same with chats, pairs of answers or labels for data."""
    _train(config, place, task_of(config, "finetune"))


VERBS: dict[str, Target] = {"pretrain": pretrain, "finetune": finetune}
"""Each verb's work on a rank."""


def task_of(config: Config, verb: str) -> Task:
    """What a run of the verb learns from."""
    if verb == "pretrain":
        return Pretraining()
    return Classification() if config.task in ("classification", "token-classification") else Finetuning()


def _train(config: Config, place: Place, task: Task) -> None:
    if place.rank == 0:
        check_without_ranks(config, place.world_size, task)
    if place.world_size > 1:
        dist.barrier()  # what rank 0 makes of the data is there
    _Run(make_parts(config, place, task)).run()


class _Run:
    """The loop over steps. All ranks are at the same place of it."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config, self.trainer = parts, parts.config, parts.trainer
        self.saver, self.journal, self.early = parts.saver, parts.journal, parts.early
        self.progress = parts.progress
        self.stop_asked = False

    def run(self) -> None:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._ask_to_stop)
        train = self.config.train
        last = min(self.config.steps, train.stop_after if train.stop_after is not None else self.config.steps)
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
        self.journal.finish(self.progress, self.early.words() if self.early is not None and self._is_over() else None)

    def _first(self) -> None:
        """Step 0: the model as initialised, evaluated if asked; saved when no step is to follow."""
        if self.parts.valid is not None:
            self.journal.write(0, {**self._evaluate(), "tokens": 0})
        if self.config.steps == 0:
            self._save()

    def _step(self, last: int) -> None:
        train, step = self.config.train, self.progress.step + 1
        shown = step % train.log_every == 0 or step == last
        with self.parts.tracer.watch(step), timed(self.trainer.executor, wanted=shown) as stopwatch:
            started = time.perf_counter()
            report = self.trainer.step(step, self.parts.train.microbatches(step - 1))
            seconds = time.perf_counter() - started
        self.parts.watch.check(step, report.loss)
        self.progress = self._after(report)
        if not report.applied:
            self.journal.skipped(report, self.progress)
        values, figures = self.journal.measured(report, self.progress, seconds), dict[str, float]()
        if shown:
            self.journal.show_step(step, report, seconds, parts=stopwatch.seconds())
        if self.parts.valid is not None and (step % train.eval_every == 0 or step == last):
            figures = self._evaluate()
            values.update(figures)
        best = self.early is not None and step % train.eval_every == 0 and self.early.add(step, figures)
        saves = step == last or best or self._is_over() or (train.save_every and step % train.save_every == 0)
        if saves and self.progress.bad_steps < train.max_bad_steps:
            self._save()
        if self.saver.stalled:
            values["save_stall_seconds"], self.saver.stalled = self.saver.stalled, 0.0
        self.journal.write(step, values)
        if self.progress.bad_steps >= train.max_bad_steps:
            self._give_up(report)
        if best or (saves and not train.async_save):
            self._finish_saving()
        if best and self.journal.is_kept:
            write_best(self.parts.folder, step=step, metric=train.early_stop_metric, value=figures[train.early_stop_metric])
            self.journal.events.write("best", step=step, metric=train.early_stop_metric, value=figures[train.early_stop_metric])

    def _after(self, report: StepReport) -> Progress:
        """Where the run stands after one more step."""
        before = self.progress
        losses = remember(before.losses, report.loss) if math.isfinite(report.loss) else before.losses
        bad_steps = 0 if report.applied else before.bad_steps + (not report.rescaled)
        return Progress(before.step + 1, before.tokens + self.config.tokens_per_step, before.updates + report.applied, bad_steps, losses,
                        loss_scaling=self.trainer.zero.loss_scaling)  # fmt: skip

    def _give_up(self, report: StepReport) -> NoReturn:
        self._finish_saving()
        where = self.trainer.culprit()
        bad = self.progress.bad_steps
        raise UserError(f"{bad} steps in a row (train.max_bad_steps) had a non-finite {bad_part(report)}; {where}")

    def _evaluate(self) -> dict[str, float]:
        """The loss, and what the task measures beside it."""
        valid = self.parts.valid
        assert valid is not None
        with self.parts.task.measure(self.trainer, self.parts.folder) as measured:
            loss, measures = self.trainer.evaluate(valid.loader.microbatches, valid.batches)
        figures = {f"valid_{name}": value for name, value in measures.items()} | measured
        self.journal.show_evaluation(self.progress.step, loss, figures)
        return {"valid_loss": loss, **figures}

    def _save(self) -> None:
        self.journal.saved(self.saver.save(self.progress, prune=self.parts.watch.has_seen_an_update(self.progress.step)))

    def _finish_saving(self) -> None:
        self.journal.saved(self.saver.finish())

    def _is_over(self) -> bool:
        return self.early is not None and self.early.is_over

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_asked = True

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop: all stop after the same step. The same message says whether any rank still writes a checkpoint."""
        flags = torch.tensor([int(self.stop_asked), int(self.saver.is_writing)], device=self.parts.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, anyone_writes = flags.tolist()
        self.journal.saved(self.saver.proceed(anyone_writes=bool(anyone_writes)))
        return bool(stop)
