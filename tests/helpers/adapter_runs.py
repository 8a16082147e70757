"""Runs of adapters that are saved and resumed within one process per rank."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.training_runs import microbatches
from megatrain.checkpoint import resume
from megatrain.checkpoint.checkpointer import Checkpointer
from megatrain.checkpoint.hf_metadata import write_hf_metadata
from megatrain.checkpoint.peft import make_adapter_config
from megatrain.checkpoint.train_state import TrainState
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.models.config import load_hf_config, read_config
from megatrain.planner.run_spec import describe_run

LORAS = {
    "llama": {"rank": 4, "alpha": 6, "rslora": True},
    "gpt2": {"rank": 3, "alpha": 6, "dora": True, "targets": ["c_attn", "c_proj"]},
}
LENGTH, BATCH = 12, 4


def batches(step: int, mesh) -> list[Batch]:
    return microbatches(
        torch.randint(0, 67, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step)),
        1,
        mesh.data,
    )


def save(folder: Path, state: TrainState, *, optimizer, config, architecture, mesh) -> Path:
    saver = Checkpointer(
        folder,
        optimizer=optimizer,
        mesh=mesh,
        run=describe_run(config, architecture, data_size=mesh.data.size),
        keep_last=0,
        keep_every=0,
        adapter_config=make_adapter_config(config.lora, architecture, init_from=None),
        write_metadata=lambda path: write_hf_metadata(
            path, architecture, dtype=torch.float32, tokenizer=None, chat=None
        ),
    )
    saver.save(state)
    return saver.finish().path


def train_and_resume(rank: int, world_size: int, config, folder: Path):
    """Returns the losses of steps 3 and 4, uninterrupted and resumed from step 2; saves step 4."""
    from megatrain.training.step_runner import StepRunner

    p, architecture = config.parallel, read_config(load_hf_config(config.model))
    mesh = make_mesh(rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size))
    more = {"config": config, "architecture": architecture, "mesh": mesh}
    first = StepRunner(config, architecture, mesh, torch.device("cpu"))
    losses = [first.train_step(step, batches(step, mesh)).loss for step in (1, 2)]
    path = save(folder, TrainState(2, 0, 2), optimizer=first.optimizer, **more)
    losses += [first.train_step(step, batches(step, mesh)).loss for step in (3, 4)]
    second = StepRunner(config, architecture, mesh, torch.device("cpu"))
    resume.check(path, describe_run(config, architecture, data_size=mesh.data.size))
    assert resume.load(path, optimizer=second.optimizer, global_batch_size=4, mesh=mesh).step == 2
    again = [second.train_step(step, batches(step, mesh)).loss for step in (3, 4)]
    save(folder, TrainState(4, 0, 4), optimizer=second.optimizer, **more)
    return losses[2:], again, first.evaluate(lambda number: batches(9, mesh), 1).loss
