"""The parts of a run on one rank, made in order: data, checkpoint to go on from, schedule, trainer, saver."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from megatrain import machine
from megatrain.beat import Beat
from megatrain.checkpoint import load as loading
from megatrain.checkpoint.descriptions import write_descriptions
from megatrain.checkpoint.pretrained import Pretrained
from megatrain.checkpoint.save import Progress
from megatrain.checkpoint.saver import Saver
from megatrain.config import Config
from megatrain.data.loader import Loader
from megatrain.models.architecture import Architecture
from megatrain.parallel.collectives import broadcast_object
from megatrain.parallel.grid import Grid, make_grid
from megatrain.place import Place
from megatrain.train import rollback
from megatrain.train.auto import settle_schedule
from megatrain.train.checks import parts_of, with_steps
from megatrain.train.early import EarlyStop
from megatrain.train.gauge import Gauge
from megatrain.train.journal import Journal
from megatrain.train.metrics import FILE_NAME, read
from megatrain.train.plausible import Watch
from megatrain.train.reference import BatchesOf, make_reference
from megatrain.train.spikes import guards
from megatrain.train.tasks import Source, Task
from megatrain.train.trace import Tracer
from megatrain.train.trainer import Trainer, wants_reference


class Validation(NamedTuple):
    """Validation data, and how many global batches of them an evaluation takes."""

    loader: Loader
    batches: int


class Parts(NamedTuple):
    """What the loop works with. `asked` is the config as the run's folder keeps it, `config` has its steps filled in."""

    asked: Config
    config: Config
    task: Task
    folder: Path
    device: torch.device
    trainer: Trainer
    tracer: Tracer
    gauge: Gauge
    train: Loader
    valid: Validation | None
    progress: Progress
    watch: Watch
    saver: Saver
    early: EarlyStop | None
    journal: Journal


def make_parts(asked: Config, place: Place, task: Task, beat: Beat) -> Parts:
    """All ranks make theirs together."""
    architecture = task.architecture(asked)
    device, folder = machine.device_of(place), Path(asked.run.output_dir)
    sources = {which: task.open(asked, architecture, which) for which in parts_of(asked)}
    config = with_steps(asked, sources["train"])
    p = config.parallel
    grid = make_grid(
        place.rank,
        tensor=p.tensor,
        pipeline=p.pipeline,
        data=config.data_size(place.world_size),
        beat=beat,
    )
    journal = Journal(config, architecture, place, device)
    path, why = _choose(config, architecture, grid)
    journal.open(
        [words for source in sources.values() for words in source.words],
        grid=grid,
        path=path,
        why=why,
    )
    pretrained = _pretrained(config, architecture, path, journal)
    train = _loader(config, grid, sources["train"])
    settled = settle_schedule(
        config,
        architecture,
        grid,
        device,
        batches=lambda: train.microbatches(0),
        resumed=path is not None,
        ranks_here=place.local_size,
    )
    config = settled.config
    gauge = Gauge(config, architecture, grid, device, settled.schedule)
    trainer = Trainer(
        config,
        architecture,
        grid,
        device,
        pretrained=pretrained,
        schedule=settled.schedule,
        channels=settled.channels,
    )
    progress = Progress(0, 0, 0, samples=0)
    if path is not None:
        beat.phase("loading the checkpoint")
        journal.say(loading.notes(path, config, grid))
        progress = loading.load(path, zero=trainer.zero, config=config, grid=grid)
    progress = rollback.resume(folder, progress, world=grid.world)
    chat = task.chat(config) if grid.rank == 0 else None
    saver = Saver(
        folder / "checkpoints",
        zero=trainer.zero,
        config=config,
        architecture=architecture,
        grid=grid,
        describe=lambda folder: write_descriptions(folder, config, architecture, chat),
    )
    valid = (
        Validation(_loader(config, grid, sources["valid"]), _eval_batches(config, sources["valid"]))
        if "valid" in sources
        else None
    )
    if wants_reference(config) == "beforehand":
        batches = _all_batches(config, train, sources["train"], valid)
        beat.phase("computing what answers are compared with")
        trainer.reference = make_reference(config, trainer, batches, resumed=path is not None)
    return Parts(
        asked=dataclasses.replace(asked, parallel=config.parallel),
        config=config,
        task=task,
        folder=folder,
        device=device,
        trainer=trainer,
        tracer=Tracer(trainer, folder),
        gauge=gauge,
        train=train,
        valid=valid,
        progress=progress,
        saver=saver,
        journal=journal,
        watch=Watch(
            path,
            progress,
            margin=0 if guards(progress, config.train) else config.train.resume_margin,
        ),
        early=early_stop(config, folder, grid, progress),
    )


def _choose(config: Config, architecture: Architecture, grid: Grid) -> tuple[Path | None, str]:
    """The checkpoint to go on from, and why. Rank 0 looks, for all: reading every file on every rank would take as many times as long."""
    found: tuple[Path | None, str] = (None, "")
    if grid.rank == 0:
        grid.beat.phase("looking for a checkpoint")
        path, why = loading.choose(config, hashes=config.train.verify == "full")
        if path is not None:
            loading.check(path, config, architecture)
        found = path, why
    found = broadcast_object(found, grid.world)
    grid.beat.phase("building the model")
    return found


def _pretrained(
    config: Config, architecture: Architecture, path: Path | None, journal: Journal
) -> Pretrained | None:
    """Weights to start from; adapters' checkpoints hold none of the frozen ones, so those come from here at a resume too."""
    if config.train.init_from is None or (path is not None and not config.lora.rank):
        return None
    pretrained = Pretrained(config.train.init_from, architecture)
    journal.warn(pretrained.notes(architecture.config))
    return pretrained


def _loader(config: Config, grid: Grid, source: Source) -> Loader:
    return Loader(
        source.samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=grid.data.rank,
        data_size=grid.data.size,
    )


def _eval_batches(config: Config, source: Source) -> int:
    """As many as asked for, but no sample twice where their number is known."""
    asked = config.train.eval_batches
    return (
        asked
        if source.per_epoch is None
        else min(asked, -(-source.per_epoch // config.train.global_batch_size))
    )


def _all_batches(
    config: Config, train: Loader, source: Source, valid: Validation | None
) -> list[tuple[BatchesOf, int]]:
    """What the run will see of training and validation data, each sequence at least once, as batches by number and how many."""
    epoch = source.per_epoch
    steps = (
        config.steps
        if epoch is None
        else min(config.steps, -(-epoch // config.train.global_batch_size))
    )
    parts: list[tuple[BatchesOf, int]] = [(train.microbatches, steps)]
    return parts if valid is None else [*parts, (valid.loader.microbatches, valid.batches)]


def early_stop(config: Config, folder: Path, grid: Grid, progress: Progress) -> EarlyStop | None:
    """With the evaluations of the run so far, as rank 0 finds them in metrics.jsonl."""
    train = config.train
    if not train.early_stop:
        return None
    early = EarlyStop(patience=train.early_stop, metric=train.early_stop_metric)
    lines = []
    if grid.rank == 0:
        lines = [
            line
            for line in read(folder / FILE_NAME)
            if "valid_loss" in line and 0 < line["step"] <= progress.step
        ]
    for line in broadcast_object(lines, grid.world):
        if line["step"] % train.eval_every == 0:  # not the end of a part of the run
            early.add(line["step"], line)
    return early
