"""A schedule that the user registers trains like a built-in one."""

import torch
from helpers.networks import LLAMA
from helpers.rank_pool import run_ranks
from helpers.training_runs import checked, microbatches

from megatrain.distributed.mesh import make_mesh
from megatrain.models.config import load_hf_config, read_config
from megatrain.pipeline import register_schedule
from megatrain.training.step_runner import StepRunner

LENGTH, BATCH, STEPS = 12, 8, 3


def in_pairs(rank, ranks, microbatches):
    """Runs two forwards, then their backwards: a schedule that no built-in name has."""
    pairs = range(0, microbatches, 2)
    return [f"{kind}{index}" for first in pairs for kind in "FB" for index in (first, first + 1)]


def train(rank, world_size, schedule):
    register_schedule("in-pairs", in_pairs)
    config = checked(
        {
            "model": LLAMA,
            "parallel": {"pipeline": world_size, "schedule": schedule},
            "train": {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2},
            "data": {"sequence_length": LENGTH},
        }
    )
    mesh = make_mesh(rank, pipeline=world_size)
    architecture = read_config(load_hf_config(LLAMA))
    runner = StepRunner(config, architecture, mesh, torch.device("cpu"))
    losses = []
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 67, (BATCH, LENGTH + 1), generator=generator)
        losses.append(runner.train_step(step, microbatches(tokens, 2, mesh.data)).loss)
    return runner.schedule.name, losses


def test_a_registered_schedule_trains_with_the_losses_of_1f1b(tmp_path):
    expected = run_ranks(train, 2, "1f1b", folder=tmp_path)
    found = run_ranks(train, 2, "in-pairs", folder=tmp_path)
    assert [name for name, _ in found] == ["in-pairs"] * 2
    assert [losses for _, losses in found] == [losses for _, losses in expected]
    assert len(set(expected[0][1])) == STEPS
