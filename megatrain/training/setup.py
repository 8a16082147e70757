"""Builds the components of a run on one rank, in the order in which they need each other."""

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
from megatrain.checkpoint.train_state import RunDescription, TrainState
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
from megatrain.training import loss_spikes
from megatrain.training.autotune import ResolvedSchedule, resolve_schedule
from megatrain.training.callback import Callback
from megatrain.training.callbacks import Checkpointing, Evaluation, ProgressLogger
from megatrain.training.early_stopping import EarlyStopping
from megatrain.training.loss_spikes import LossSpikes
from megatrain.training.memory_monitor import MemoryMonitor
from megatrain.training.nonfinite import NonFiniteSteps
from megatrain.training.preflight import data_parts
from megatrain.training.ref_logprobs import BatchesOf, make_ref_logprobs
from megatrain.training.resume_check import ResumeCheck
from megatrain.training.run_logger import RunLogger
from megatrain.training.step_runner import StepRunner, reference_mode
from megatrain.training.task import DataSource, Task
from megatrain.training.trace_recorder import TraceRecorder


class Validation(NamedTuple):
    """Validation data, and the number of global batches of an evaluation."""

    loader: DataLoader
    batches: int


class TrainComponents(NamedTuple):
    """The components of a run.

    Attributes:
        requested: the config as the run's folder keeps it.
        config: the same with the number of steps filled in.
        resumed_from: the checkpoint that was loaded.
        callbacks: the built-in callbacks that the config enables, in the order of callback.py.
    """

    requested: Config
    config: Config
    task: Task
    folder: Path
    mesh: ProcessMesh
    runner: StepRunner
    train: DataLoader
    valid: Validation | None
    state: TrainState
    resumed_from: Path | None
    checkpointer: Checkpointer
    run_logger: RunLogger
    callbacks: list[Callback]


def set_up(requested: Config, env: RankEnv, task: Task, activity: RankActivity) -> TrainComponents:
    """Builds the components; all ranks call it together."""
    architecture = task.architecture(requested)
    device = device_module.select_device(env)
    sources = {which: task.open(requested, architecture, which) for which in data_parts(requested)}
    spec = RunSpec.create(requested, architecture, Cluster(1, env.world_size, device.type))
    spec = spec.with_samples(sources["train"].per_epoch)
    config = spec.config
    mesh = _mesh(spec, env, activity)
    run_logger = RunLogger(spec, env, device)
    path, reason = _choose_checkpoint(config, architecture, mesh)
    notes = [note for source in sources.values() for note in source.notes]
    run_logger.log_start(notes, mesh=mesh, checkpoint=path, reason=reason)
    pretrained = _pretrained(config, architecture, path, run_logger)
    train = _loader(config, mesh, sources["train"])
    resolved = resolve_schedule(
        config,
        architecture,
        mesh,
        device,
        batches=lambda: train.microbatches(0),
        resumed=path is not None,
        local_ranks=env.local_size,
    )
    config = resolved.config
    spec = dataclasses.replace(spec, config=config)
    memory_monitor = MemoryMonitor(spec, mesh, device, resolved.schedule)
    runner = _runner(config, architecture, mesh, device, pretrained, resolved)
    run = describe_run(config, architecture, data_size=mesh.data.size)
    state = _load_state(config, run, mesh, runner, path, run_logger)
    valid = None
    if "valid" in sources:
        batches = _eval_batches(config, sources["valid"])
        valid = Validation(_loader(config, mesh, sources["valid"]), batches)
    if reference_mode(config) == "beforehand":
        activity.set_phase("computing reference log-probabilities")
        runner.ref_logprobs = make_ref_logprobs(
            config,
            runner,
            _all_batches(config, train, sources["train"], valid),
            resumed=path is not None,
        )
    return TrainComponents(
        requested=dataclasses.replace(requested, parallel=config.parallel),
        config=config,
        task=task,
        folder=Path(requested.run.output_dir),
        mesh=mesh,
        runner=runner,
        train=train,
        valid=valid,
        state=state,
        resumed_from=path,
        checkpointer=_checkpointer(config, run, architecture, mesh, runner, task),
        run_logger=run_logger,
        callbacks=_callbacks(
            config, runner, memory_monitor, state, path, evaluates=valid is not None
        ),
    )


def _mesh(spec: RunSpec, env: RankEnv, activity: RankActivity) -> ProcessMesh:
    return make_mesh(
        env.rank,
        tensor=spec.config.parallel.tensor,
        pipeline=spec.config.parallel.pipeline,
        data=spec.data_size,
        activity=activity,
    )


def _choose_checkpoint(
    config: Config, architecture: TransformerConfig, mesh: ProcessMesh
) -> tuple[Path | None, str]:
    """Returns the checkpoint to resume from, and why.

    Rank 0 looks for all ranks: reading every file on every rank would take many times as long.
    """
    found: tuple[Path | None, str] = (None, "")
    if mesh.rank == 0:
        mesh.activity.set_phase("looking for a checkpoint")
        path, reason = choose_start(config, hashes=config.checkpoint.verify == "full")
        if path is not None:
            resume.check(path, describe_run(config, architecture, data_size=mesh.data.size))
        found = path, reason
    found = broadcast_object(found, mesh.world)
    mesh.activity.set_phase("building the model")
    return found


def _pretrained(
    config: Config, architecture: TransformerConfig, path: Path | None, run_logger: RunLogger
) -> Pretrained | None:
    """Returns the weights of `train.init_from`, if the model starts from them.

    Checkpoints of adapters do not contain the frozen weights, so these come from there at a resume
    too.
    """
    if config.train.init_from is None or (path is not None and not config.lora.rank):
        return None
    pretrained = Pretrained(config.train.init_from, architecture)
    for note in pretrained.describe_differences(architecture.config.to_dict()):
        run_logger.warning(f"  {note}")
    return pretrained


def _runner(
    config: Config,
    architecture: TransformerConfig,
    mesh: ProcessMesh,
    device: torch.device,
    pretrained: Pretrained | None,
    resolved: ResolvedSchedule,
) -> StepRunner:
    return StepRunner(
        config,
        architecture,
        mesh,
        device,
        pretrained=pretrained,
        schedule=resolved.schedule,
        channels=resolved.channels,
    )


def _load_state(
    config: Config,
    run: RunDescription,
    mesh: ProcessMesh,
    runner: StepRunner,
    path: Path | None,
    run_logger: RunLogger,
) -> TrainState:
    """Loads the checkpoint, if there is one; returns the state to start in."""
    state = TrainState(0, 0, 0, samples=0)
    if path is not None:
        mesh.activity.set_phase("loading the checkpoint")
        if run_logger.is_main_process:
            for note in resume.describe_differences(path, run):
                run_logger.info(f"  {note}")
        state = resume.load(
            path,
            optimizer=runner.optimizer,
            global_batch_size=config.train.global_batch_size,
            mesh=mesh,
        )
    return loss_spikes.resume_skipping(Path(config.run.output_dir), state, world=mesh.world)


def _checkpointer(
    config: Config,
    run: RunDescription,
    architecture: TransformerConfig,
    mesh: ProcessMesh,
    runner: StepRunner,
    task: Task,
) -> Checkpointer:
    chat = task.chat(config) if mesh.rank == 0 else None
    adapter_config = None
    if config.lora.rank:
        init_from = config.train.init_from
        adapter_config = make_adapter_config(config.lora, architecture, init_from=init_from)
    return Checkpointer(
        Path(config.run.output_dir) / "checkpoints",
        optimizer=runner.optimizer,
        mesh=mesh,
        run=run,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        adapter_config=adapter_config,
        write_metadata=lambda folder: write_hf_metadata(
            folder,
            architecture,
            dtype=DTYPES[config.train.dtype],
            tokenizer=config.data.tokenizer,
            chat=chat,
        ),
    )


def _callbacks(
    config: Config,
    runner: StepRunner,
    memory_monitor: MemoryMonitor,
    state: TrainState,
    resumed_from: Path | None,
    *,
    evaluates: bool,
) -> list[Callback]:
    """Returns the built-in callbacks that the config enables, in the order of callback.py."""
    checkpoint, stability = config.checkpoint, config.stability
    callbacks: list[Callback] = []
    if config.profile.steps is not None:
        first, last = config.profile.steps
        folder = Path(config.run.output_dir)
        callbacks.append(TraceRecorder(runner, folder, range(first, last + 1)))
    if resumed_from is not None and not loss_spikes.is_guarded(state, stability):
        callbacks.append(
            ResumeCheck(resumed_from, state, tolerance=checkpoint.resume_loss_tolerance)
        )
    callbacks += [ProgressLogger(config.train.log_every), memory_monitor]
    if stability.on_loss_spike != "off":
        callbacks.append(LossSpikes(stability, check_hashes=checkpoint.verify == "full"))
    callbacks.append(NonFiniteSteps(stability.max_nonfinite_steps))
    if evaluates:
        callbacks.append(Evaluation(config.eval.every))
    if config.eval.early_stopping_patience:
        callbacks.append(
            EarlyStopping(
                patience=config.eval.early_stopping_patience,
                metric=config.eval.early_stopping_metric,
                every=config.eval.every,
            )
        )
    callbacks.append(Checkpointing(checkpoint.save_every, in_background=checkpoint.async_save))
    return callbacks


def _loader(config: Config, mesh: ProcessMesh, source: DataSource) -> DataLoader:
    return DataLoader(
        source.samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
    )


def _batches_per_epoch(config: Config, source: DataSource) -> int | None:
    """Returns the global batches of an epoch; None if the data do not count epochs."""
    if source.per_epoch is None:
        return None
    return -(-source.per_epoch // config.train.global_batch_size)


def _eval_batches(config: Config, source: DataSource) -> int:
    """Returns the global batches of an evaluation, at most one epoch."""
    requested, epoch = config.eval.batches, _batches_per_epoch(config, source)
    return requested if epoch is None else min(requested, epoch)


def _all_batches(
    config: Config, train: DataLoader, source: DataSource, valid: Validation | None
) -> list[tuple[BatchesOf, int]]:
    """Returns batches by number, and their count, that contain each sequence of the run."""
    epoch = _batches_per_epoch(config, source)
    steps = config.steps if epoch is None else min(config.steps, epoch)
    batches: list[tuple[BatchesOf, int]] = [(train.microbatches, steps)]
    return batches if valid is None else [*batches, (valid.loader.microbatches, valid.batches)]
