"""A run from config to finish, the parts in order."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatrain import machine
from megatrain.checkpoint import load as loading
from megatrain.checkpoint.best import write_best
from megatrain.checkpoint.descriptions import write_descriptions
from megatrain.checkpoint.pretrained import Pretrained
from megatrain.checkpoint.save import Progress
from megatrain.checkpoint.saver import Saved, Saver
from megatrain.config import Config, to_yaml
from megatrain.data.loader import Loader
from megatrain.data.splits import Part
from megatrain.errors import UserError
from megatrain.parallel.grid import make_grid
from megatrain.place import Place
from megatrain.rank import Target
from megatrain.train import console
from megatrain.train.auto import settle_schedule
from megatrain.train.checks import check_without_ranks, parts_of, run_header, with_steps
from megatrain.train.classifying import Classification
from megatrain.train.early import EarlyStop
from megatrain.train.finetuning import Finetuning
from megatrain.train.flops import flops_per_token, peak_flops
from megatrain.train.metrics import FILE_NAME, MetricsLog, read
from megatrain.train.picture import draw_loss
from megatrain.train.plausible import Watch, remember
from megatrain.train.reference import BatchesOf, make_reference
from megatrain.train.tasks import Pretraining, Source, Task
from megatrain.train.trace import Tracer
from megatrain.train.trainer import StepReport, Trainer, wants_reference

logger = logging.getLogger("megatrain")


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
    _Training(config, place, task).run()


class _Training:
    """The loop and what happens every n steps around it."""

    def __init__(self, config: Config, place: Place, task: Task) -> None:
        self.asked, self.place = config, place
        self.architecture = task.architecture(config)
        data_size = config.data_size(place.world_size)
        self.device = machine.device_of(place)
        sources = {which: task.open(config, self.architecture, which) for which in parts_of(config)}
        self.config = config = with_steps(config, sources["train"])
        self.grid = make_grid(place.rank, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline, data=data_size)
        self.folder = Path(config.run.output_dir)
        if place.rank == 0:
            device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
            logger.info(run_header(config, self.architecture, place.world_size, device))
        path, why = self._choose()
        if place.rank == 0:
            for words in (words for source in sources.values() for words in source.words):
                logger.info(f"  data    {words}")
            logger.info(f"  {why}")
        pretrained = None
        if config.train.init_from is not None and (path is None or config.lora.rank):  # adapters' checkpoints hold no frozen weights
            pretrained = Pretrained(config.train.init_from, self.architecture)
            for words in pretrained.notes(self.architecture.config) if place.rank == 0 else []:
                logger.warning(f"  {words}")
        self.train_loader = self._loader(sources["train"])
        settled = settle_schedule(config, self.architecture, self.grid, self.device, batches=lambda: self.train_loader.microbatches(0),
                                  resumed=path is not None, ranks_here=place.local_size)  # fmt: skip
        self.config = config = settled.config
        self.asked = dataclasses.replace(self.asked, parallel=config.parallel)
        self.trainer = Trainer(config, self.architecture, self.grid, self.device, pretrained=pretrained, schedule=settled.schedule,
                               channels=settled.channels)  # fmt: skip
        self.tracer = Tracer(self.trainer, self.folder)
        self.progress = Progress(0, 0, 0)
        if path is not None:
            for words in loading.notes(path, config, self.grid) if place.rank == 0 else []:
                logger.info(f"  {words}")
            self.progress = loading.load(path, zero=self.trainer.zero, config=config, grid=self.grid)
        self.watch = Watch(path, self.progress, margin=config.train.resume_margin)
        chat = task.chat(config) if place.rank == 0 else None
        self.saver = Saver(self.folder / "checkpoints", zero=self.trainer.zero, config=config, architecture=self.architecture, grid=self.grid,
                           describe=lambda folder: write_descriptions(folder, config, self.architecture, chat))  # fmt: skip
        self.valid_loader = self._loader(sources["valid"]) if config.train.eval_every else None
        self.eval_batches = _eval_batches(config, sources)
        if wants_reference(config) == "beforehand":
            self.trainer.reference = make_reference(config, self.trainer, self._all_batches(sources), resumed=path is not None)
        self.stop_asked = False
        self.task, self.early = task, self._early_stop()
        self.flops = flops_per_token(self.architecture.config, sequence_length=config.data.sequence_length, frozen=config.lora.rank > 0,
                                     head=self.architecture.classifier is None)  # fmt: skip
        self.peak = peak_flops(torch.cuda.get_device_name(), config.train.dtype) if self.device.type == "cuda" else None

    def _choose(self) -> tuple[Path | None, str]:
        """Rank 0 looks, for all: reading every file on every rank would take as many times as long."""
        found: list[Any] = [None]
        if self.place.rank == 0:
            path, why = loading.choose(self.config, hashes=self.config.train.verify == "full")
            if path is not None:
                loading.check(path, self.config, self.architecture)
            found = [(path, why)]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _loader(self, source: Source) -> Loader:
        train = self.config.train
        return Loader(source.samples, global_batch_size=train.global_batch_size,
                      micro_batch_size=train.micro_batch_size, data_rank=self.grid.data.rank, data_size=self.grid.data.size)  # fmt: skip

    def _all_batches(self, sources: dict[Part, Source]) -> list[tuple[BatchesOf, int]]:
        """What the run will see of training and validation data, each sequence at least once, as batches by number and how many."""
        train = self.config.train
        epoch = sources["train"].per_epoch
        steps = self.config.steps if epoch is None else min(self.config.steps, -(-epoch // train.global_batch_size))
        parts: list[tuple[BatchesOf, int]] = [(self.train_loader.microbatches, steps)]
        return parts if self.valid_loader is None else [*parts, (self.valid_loader.microbatches, self.eval_batches)]

    def run(self) -> None:
        config = self.config
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._ask_to_stop)
        metrics = None
        if self.place.rank == 0:
            (self.folder / "config.yaml").write_text(to_yaml(self.asked), encoding="utf-8")
            metrics = MetricsLog(self.folder, after_step=self.progress.step)
        last = min(config.steps, config.train.stop_after if config.train.stop_after is not None else config.steps)
        if self.progress.step >= last > 0 and self.place.rank == 0:
            logger.info(f"nothing left to train: step {self.progress.step} is done, and the run ends after step {last}")
        try:
            if self.progress.step == 0:
                self._first(metrics)
            while self.progress.step < last and not self._is_over():
                self._step(metrics, last)
                if self._agree_to_stop() and self.progress.step < last:
                    self._save()
                    self._finish_saving()
                    if self.place.rank == 0:
                        logger.info(f"stopped by a signal after step {self.progress.step}; start the same command to go on")
                    break
            self._finish_saving()
        finally:
            self.train_loader.close()
            if self.valid_loader is not None:
                self.valid_loader.close()
            if metrics is not None:
                metrics.close()
        if self.place.rank == 0:
            if self.early is not None and self._is_over():
                logger.info(self.early.words())
            draw_loss(self.folder, title=config.run_name)
            left = [name for name in ("checkpoints", "metrics.jsonl", "loss.png", "tensorboard") if (self.folder / name).exists()]
            logger.info(f"everything is in {self.folder}: {', '.join(left)}")

    def _first(self, metrics: MetricsLog | None) -> None:
        """Step 0: the model as initialised, evaluated if asked; saved when no step is to follow."""
        if self.valid_loader is not None:
            figures = self._evaluate()
            if metrics is not None:
                metrics.write(0, {**figures, "tokens": 0})
        if self.config.steps == 0:
            self._save()

    def _step(self, metrics: MetricsLog | None, last: int) -> None:
        config, step = self.config, self.progress.step + 1
        with self.tracer.watch(step):
            started = time.perf_counter()
            report = self.trainer.step(step, self.train_loader.microbatches(step - 1))
            seconds = time.perf_counter() - started
        self.watch.check(step, report.loss)
        losses = remember(self.progress.losses, report.loss) if math.isfinite(report.loss) else self.progress.losses
        self.progress = Progress(step, self.progress.tokens + config.tokens_per_step, self.progress.updates + report.applied,
                                 0 if report.applied else self.progress.bad_steps + 1, losses)  # fmt: skip
        if not report.applied:
            self._warn(report)
        values, figures = self._values(report, seconds), dict[str, float]()
        if (step % config.train.log_every == 0 or step == last) and self.place.rank == 0:
            self._print(report, seconds)
        if self.valid_loader is not None and (step % config.train.eval_every == 0 or step == last):
            figures = self._evaluate()
            values.update(figures)
        judged = self.early is not None and step % config.train.eval_every == 0
        best = judged and self.early.add(step, figures)  # type: ignore[union-attr]
        saves = step == last or best or self._is_over() or (config.train.save_every and step % config.train.save_every == 0)
        if saves and self.progress.bad_steps < config.train.max_bad_steps:
            self._save()
        if self.saver.stalled:
            values["save_stall_seconds"], self.saver.stalled = self.saver.stalled, 0.0
        if metrics is not None:
            metrics.write(step, values)
        if self.progress.bad_steps >= config.train.max_bad_steps:
            self._give_up(report)
        if best or (saves and not config.train.async_save):
            self._finish_saving()
        if best and self.place.rank == 0:
            write_best(self.folder, step=step, metric=config.train.early_stop_metric, value=figures[config.train.early_stop_metric])

    def _warn(self, report: StepReport) -> None:
        if self.place.rank == 0:
            bad = self.progress.bad_steps
            logger.warning(f"step {self.progress.step}: non-finite {_bad_part(report)}, skipped ({bad} in a row)")

    def _give_up(self, report: StepReport) -> NoReturn:
        self._finish_saving()
        where = self.trainer.first_bad_layer()
        bad = self.progress.bad_steps
        raise UserError(f"{bad} steps in a row (train.max_bad_steps) had a non-finite {_bad_part(report)}; {where}")

    def _values(self, report: StepReport, seconds: float) -> dict[str, float | int | str | bool | None]:
        rate = self.config.tokens_per_step / seconds
        per_rank = rate * self.flops / self.place.world_size
        return {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr, "tokens": self.progress.tokens,
                "seconds": seconds, "tokens_per_second": rate, "tflops_per_rank": per_rank / 1e12,
                "mfu": per_rank / self.peak if self.peak else None, "skipped": not report.applied, **report.measures}  # fmt: skip

    def _print(self, report: StepReport, seconds: float) -> None:
        rate = self.config.tokens_per_step / seconds
        logger.info(console.step_line(console.Step(
            step=self.progress.step, steps=self.config.steps, loss=report.loss, grad_norm=report.grad_norm, lr=report.lr,
            tokens_per_second=rate, flops_per_second=rate * self.flops, seconds_per_step=seconds)))  # fmt: skip

    def _evaluate(self) -> dict[str, float]:
        """The loss, and what the task measures beside it."""
        assert self.valid_loader is not None
        with self.task.measure(self.trainer, self.folder) as measured:
            loss, measures = self.trainer.evaluate(self.valid_loader.microbatches, self.eval_batches)
        figures = {f"valid_{name}": value for name, value in measures.items()} | measured
        if self.place.rank == 0:
            logger.info(console.evaluation_line(step=self.progress.step, steps=self.config.steps, loss=loss, measured=figures))
        return {"valid_loss": loss, **figures}

    def _save(self) -> None:
        self._say_saved(self.saver.save(self.progress, prune=self.watch.has_seen_an_update(self.progress.step)))

    def _finish_saving(self) -> None:
        self._say_saved(self.saver.finish())

    def _say_saved(self, saved: Saved | None) -> None:
        if saved is not None and self.place.rank == 0:
            logger.info(f"saved {saved.path} ({saved.seconds:.1f} s, for {saved.stalled:.2f} s of which training stood still)")

    def _early_stop(self) -> EarlyStop | None:
        """With the evaluations of the run so far, as rank 0 finds them in metrics.jsonl."""
        train = self.config.train
        if not train.early_stop:
            return None
        early = EarlyStop(patience=train.early_stop, metric=train.early_stop_metric)
        lines: list[Any] = [None]
        if self.place.rank == 0:
            lines = [[line for line in read(self.folder / FILE_NAME) if "valid_loss" in line and 0 < line["step"] <= self.progress.step]]
        if self.place.world_size > 1:
            dist.broadcast_object_list(lines, src=0)
        for line in lines[0]:
            if line["step"] % train.eval_every == 0:  # not the end of a part of the run
                early.add(line["step"], line)
        return early

    def _is_over(self) -> bool:
        return self.early is not None and self.early.is_over

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_asked = True

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop: all stop after the same step. The same message says whether any rank still writes a checkpoint."""
        flags = torch.tensor([int(self.stop_asked), int(self.saver.is_writing)], device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, anyone_writes = flags.tolist()
        self._say_saved(self.saver.proceed(anyone_writes=bool(anyone_writes)))
        return bool(stop)


def _eval_batches(config: Config, sources: dict[Part, Source]) -> int:
    """As many as asked for, but no sample twice where their number is known."""
    asked, per_epoch = config.train.eval_batches, sources["valid"].per_epoch if "valid" in sources else None
    return asked if per_epoch is None else min(asked, -(-per_epoch // config.train.global_batch_size))


def _bad_part(report: StepReport) -> str:
    return "gradient" if math.isfinite(report.loss) else "loss"
