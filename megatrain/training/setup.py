"""The parts of a run on one rank, made in order: data, checkpoint to go on from, schedule, runner, saver."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from megatrain.checkpoint import resume
from megatrain.checkpoint.checkpointer import Checkpointer
from megatrain.checkpoint.hf_metadata import write_hf_metadata
from megatrain.checkpoint.init_from_hf import Pretrained
from megatrain.checkpoint.peft import make_adapter_config
from megatrain.checkpoint.train_state import TrainState
from megatrain.config.loader import Config
from megatrain.data.dataloader import DataLoader
from megatrain.distributed import device as device_module
from megatrain.distributed.activity import RankActivity
from megatrain.distributed.collectives import broadcast_object
from megatrain.distributed.env import RankEnv
from megatrain.distributed.mesh import ProcessMesh, make_mesh
from megatrain.models.config import TransformerConfig
from megatrain.ops.dtypes import DTYPES
from megatrain.planner.run_spec import Cluster, RunSpec, choose_start, describe_run
from megatrain.telemetry.metrics import FILE_NAME, read
from megatrain.training import rollback
from megatrain.training.autotune import resolve_schedule
from megatrain.training.early_stopping import EarlyStopping
from megatrain.training.loss_spikes import guards
from megatrain.training.memory_monitor import MemoryMonitor
from megatrain.training.preflight import data_parts
from megatrain.training.ref_logprobs import BatchesOf, make_ref_logprobs
from megatrain.training.resume_check import ResumeCheck
from megatrain.training.run_logger import RunLogger
from megatrain.training.step_runner import StepRunner, reference_mode
from megatrain.training.task import DataSource, Task
from megatrain.training.trace_recorder import Tracer


class Validation(NamedTuple):
    """Validation data, and how many global batches of them an evaluation takes."""

    loader: DataLoader
    batches: int


class TrainComponents(NamedTuple):
    """What the loop works with. `asked` is the config as the run's folder keeps it, `config` has its steps filled in."""

    asked: Config
    config: Config
    task: Task
    folder: Path
    device: torch.device
    runner: StepRunner
    tracer: Tracer
    gauge: MemoryMonitor
    train: DataLoader
    valid: Validation | None
    progress: TrainState
    watch: ResumeCheck
    saver: Checkpointer
    early: EarlyStopping | None
    journal: RunLogger


def set_up(asked: Config, place: RankEnv, task: Task, activity: RankActivity) -> TrainComponents:
    """All ranks make theirs together."""
    architecture = task.architecture(asked)
    device, folder = device_module.select_device(place), Path(asked.run.output_dir)
    sources = {which: task.open(asked, architecture, which) for which in data_parts(asked)}
    spec = RunSpec.create(asked, architecture, Cluster(1, place.world_size, device.type))
    spec = spec.with_samples(sources["train"].per_epoch)
    config = spec.config
    p = config.parallel
    mesh = make_mesh(
        place.rank,
        tensor=p.tensor,
        pipeline=p.pipeline,
        data=spec.data_size,
        activity=activity,
    )
    journal = RunLogger(spec, place, device)
    path, why = _choose(config, architecture, mesh)
    journal.open(
        [words for source in sources.values() for words in source.words],
        mesh=mesh,
        path=path,
        why=why,
    )
    pretrained = _pretrained(config, architecture, path, journal)
    train = _loader(config, mesh, sources["train"])
    settled = resolve_schedule(
        config,
        architecture,
        mesh,
        device,
        batches=lambda: train.microbatches(0),
        resumed=path is not None,
        ranks_here=place.local_size,
    )
    config = settled.config
    spec = dataclasses.replace(spec, config=config)
    gauge = MemoryMonitor(spec, mesh, device, settled.schedule)
    runner = StepRunner(
        config,
        architecture,
        mesh,
        device,
        pretrained=pretrained,
        schedule=settled.schedule,
        channels=settled.channels,
    )
    progress = TrainState(0, 0, 0, samples=0)
    run = describe_run(config, architecture, data_size=mesh.data.size)
    if path is not None:
        activity.set_phase("loading the checkpoint")
        journal.say(resume.describe_differences(path, run))
        progress = resume.load(
            path,
            optimizer=runner.optimizer,
            global_batch_size=config.train.global_batch_size,
            mesh=mesh,
        )
    progress = rollback.resume(folder, progress, world=mesh.world)
    chat = task.chat(config) if mesh.rank == 0 else None
    saver = Checkpointer(
        folder / "checkpoints",
        optimizer=runner.optimizer,
        mesh=mesh,
        run=run,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        adapter_config=make_adapter_config(
            config.lora, architecture, init_from=config.train.init_from
        )
        if config.lora.rank
        else None,
        write_metadata=lambda folder: write_hf_metadata(
            folder,
            architecture,
            dtype=DTYPES[config.train.dtype],
            tokenizer=config.data.tokenizer,
            chat=chat,
        ),
    )
    valid = (
        Validation(_loader(config, mesh, sources["valid"]), _eval_batches(config, sources["valid"]))
        if "valid" in sources
        else None
    )
    if reference_mode(config) == "beforehand":
        batches = _all_batches(config, train, sources["train"], valid)
        activity.set_phase("computing what answers are compared with")
        runner.ref_logprobs = make_ref_logprobs(config, runner, batches, resumed=path is not None)
    return TrainComponents(
        asked=dataclasses.replace(asked, parallel=config.parallel),
        config=config,
        task=task,
        folder=folder,
        device=device,
        runner=runner,
        tracer=Tracer(runner, folder),
        gauge=gauge,
        train=train,
        valid=valid,
        progress=progress,
        saver=saver,
        journal=journal,
        watch=ResumeCheck(
            path,
            progress,
            margin=0
            if guards(progress, config.stability)
            else config.checkpoint.resume_loss_tolerance,
        ),
        early=early_stop(config, folder, mesh, progress),
    )


def _choose(
    config: Config, architecture: TransformerConfig, mesh: ProcessMesh
) -> tuple[Path | None, str]:
    """The checkpoint to go on from, and why. Rank 0 looks, for all: reading every file on every rank would take as many times as long."""
    found: tuple[Path | None, str] = (None, "")
    if mesh.rank == 0:
        mesh.activity.set_phase("looking for a checkpoint")
        path, why = choose_start(config, hashes=config.checkpoint.verify == "full")
        if path is not None:
            resume.check(path, describe_run(config, architecture, data_size=mesh.data.size))
        found = path, why
    found = broadcast_object(found, mesh.world)
    mesh.activity.set_phase("building the model")
    return found


def _pretrained(
    config: Config, architecture: TransformerConfig, path: Path | None, journal: RunLogger
) -> Pretrained | None:
    """Weights to start from; adapters' checkpoints hold none of the frozen ones, so those come from here at a resume too."""
    if config.train.init_from is None or (path is not None and not config.lora.rank):
        return None
    pretrained = Pretrained(config.train.init_from, architecture)
    journal.warn(pretrained.describe_differences(architecture.config.to_dict()))
    return pretrained


def _loader(config: Config, mesh: ProcessMesh, source: DataSource) -> DataLoader:
    return DataLoader(
        source.samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
    )


def _eval_batches(config: Config, source: DataSource) -> int:
    """As many as asked for, but no sample twice where their number is known."""
    asked = config.eval.batches
    return (
        asked
        if source.per_epoch is None
        else min(asked, -(-source.per_epoch // config.train.global_batch_size))
    )


def _all_batches(
    config: Config, train: DataLoader, source: DataSource, valid: Validation | None
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


def early_stop(
    config: Config, folder: Path, mesh: ProcessMesh, progress: TrainState
) -> EarlyStopping | None:
    """With the evaluations of the run so far, as rank 0 finds them in metrics.jsonl."""
    if not config.eval.early_stopping_patience:
        return None
    early = EarlyStopping(
        patience=config.eval.early_stopping_patience, metric=config.eval.early_stopping_metric
    )
    lines = []
    if mesh.rank == 0:
        lines = [
            line
            for line in read(folder / FILE_NAME)
            if "valid_loss" in line and 0 < line["step"] <= progress.step
        ]
    for line in broadcast_object(lines, mesh.world):
        if line["step"] % config.eval.every == 0:  # not the end of a part of the run
            early.add(line["step"], line)
    return early
