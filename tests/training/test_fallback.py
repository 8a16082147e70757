"""A resume reports damaged checkpoints, and stops at intact ones with wrong content."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.rank_pool import run_ranks
from helpers.training_runs import lines, merge_sections, pretrain, write_tokens
from safetensors.torch import load_file, save_file

from megatrain.checkpoint import manifest
from megatrain.checkpoint import resume as resume_module
from megatrain.checkpoint.train_state import read_train_state
from megatrain.config import loader as configuration
from megatrain.errors import UserError
from megatrain.models.config import load_hf_config, read_config
from megatrain.planner.run_spec import choose_start, describe_run

MODEL = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def settings(folder, **sections):
    raw = {
        "run": {"output_dir": str(folder / "run")},
        "model": MODEL,
        "train": {
            "steps": 20,
            "exit_after_step": 10,
            "global_batch_size": 4,
            "micro_batch_size": 4,
        },
        "checkpoint": {"save_every": 4},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "data": {"train": str(folder / "tokens"), "sequence_length": 16},
    }
    return merge_sections(raw, sections)


def what_stopped(rank, world_size, raw):
    """Returns the error of a run; None without one."""
    try:
        pretrain(rank, world_size, raw)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Trains to step 10, with checkpoints of steps 4, 8 and 10."""
    folder = tmp_path_factory.mktemp("finished")
    write_tokens(folder / "tokens", below=20)
    assert run_ranks(what_stopped, 1, settings(folder), folder=folder) == [None]
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """Copies the run, so that a test may damage it."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def checkpoint(folder, step=10):
    return folder / "run" / "checkpoints" / f"step-{step:08d}"


def resume(folder, *, last=14, **checkpoint):
    raw = settings(folder, train={"exit_after_step": last}, checkpoint=checkpoint)
    (outcome,) = run_ranks(what_stopped, 1, raw, folder=folder)
    return outcome


def change(folder, what):
    """Changes tensors of the optimizer, and the manifest with them."""
    file = folder / "optimizer" / "rank-00000.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        what(name.rpartition("/")[2], tensor)
    save_file(tensors, file)
    records = [
        manifest.FileRecord(**entry)
        for entry in json.loads((folder / manifest.MANIFEST).read_text())["files"]
    ]
    records = [manifest.make_record(folder, folder / entry.path) for entry in records]
    (folder / manifest.MANIFEST).write_text(
        json.dumps({"format": manifest.FORMAT, "files": [entry._asdict() for entry in records]})
    )
    assert manifest.find_problem(folder, hashes=True) is None


def test_checkpoint_keeps_the_last_losses(finished):
    told = lines(finished / "run")
    assert list(read_train_state(checkpoint(finished)).state.losses) == [
        line["loss"] for line in told
    ]
    assert sum("checkpoint_blocking_seconds" in line for line in told) >= 2


def test_resume_from_an_intact_checkpoint(run):
    assert resume(run) is None
    assert manifest.find_problem(checkpoint(run, 14), hashes=True) is None


def random_weights(state, tensor):
    if state == "master":
        tensor.copy_(
            torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
        )


def random_moments(state, tensor):
    if state != "master":
        tensor.copy_(
            torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
            if state == "exp_avg"
            else torch.zeros_like(tensor)
        )


@pytest.mark.parametrize(("what", "step"), [(random_weights, 11), (random_moments, 12)])
def test_resume_with_wrong_weights_or_moments_stops(what, step, run):
    change(checkpoint(run), what)
    words = resume(run, keep_last=1, save_every=1)
    assert "step-00000010 gives an implausible loss: " in words
    assert f" at step {step}, after" in words
    assert "Resume from an older checkpoint with checkpoint.resume=FOLDER" in words
    assert manifest.find_problem(checkpoint(run), hashes=True) is None, (
        "what it began from is still there"
    )
    assert resume(run, resume=str(checkpoint(run, 8))) is None


def test_resume_check_can_be_disabled(run):
    change(checkpoint(run), random_weights)
    assert resume(run, resume_loss_tolerance=0) is None


def flip(folder):
    file = folder / "optimizer" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_verify_full_compares_content(run):
    flip(checkpoint(run))
    (checkpoint(run, 8) / "config.json").unlink()
    config = configuration.from_dict(settings(run, checkpoint={"verify": "full"}))
    assert choose_start(config)[0] == checkpoint(run)
    path, words = choose_start(config, hashes=True)
    assert path == checkpoint(run, 4)
    assert (
        "skipped: step-00000010 has other content in optimizer/rank-00000.safetensors than was "
        "written" in words
    )
    assert "skipped: step-00000008 lacks config.json" in words
    assert resume(run, verify="full") is None
    assert [line["step"] for line in lines(run / "run")] == list(range(1, 15))


def test_later_checkpoints_are_reported(run):
    ahead = (
        f"; {checkpoint(run)} is of a later step and checkpoint.resume=auto would resume from it"
    )
    for wish in ("never", str(checkpoint(run, 4))):
        assert (
            ahead
            in choose_start(configuration.from_dict(settings(run, checkpoint={"resume": wish})))[1]
        )
    assert (
        "later step"
        not in choose_start(
            configuration.from_dict(settings(run, checkpoint={"resume": str(checkpoint(run))}))
        )[1]
    )
    assert resume(run, resume="never", last=9, keep_last=1) is None
    assert checkpoint(run).exists()
    assert checkpoint(run, 9).exists(), "what lies ahead has not pushed it out"
    assert not checkpoint(run, 4).exists()


CHANGES = {
    "was written with optimizer.name=adamw and this run has lion: update rules do not": {
        "optimizer": {"name": "lion", "lr": 1e-3}
    },
    "was written with train.global_batch_size=4 and this run has 8: step and batch size": {
        "train": {"global_batch_size": 8}
    },
    "was written with data.sequence_length=16 and this run has 8": {"data": {"sequence_length": 8}},
    "was written with run.seed=1234 and this run has 5": {"run": {"seed": 5}},
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_settings_that_a_resume_must_not_change(sentence, finished):
    raw = settings(finished)
    for section, values in CHANGES[sentence].items():
        raw[section] = {**raw[section], **values}
    (words,) = run_ranks(what_stopped, 1, raw, folder=finished)
    assert sentence in words
    assert (
        f"or start a new run from its weights with train.init_from={checkpoint(finished)}" in words
    )


def test_changed_settings_are_reported(finished):
    raw = settings(
        finished, parallel={"tensor": 2, "pipeline": 2, "zero": 0}, train={"dtype": "bf16"}
    )
    raw["data"]["train"] = "elsewhere"
    config = configuration.from_dict(raw)
    words = resume_module.describe_differences(
        checkpoint(finished),
        describe_run(config, read_config(load_hf_config(config.model)), data_size=1),
    )
    assert words == [
        "resuming on another layout, equal up to rounding: tensor 1 -> 2, pipeline 1 -> 2, zero 1 "
        "-> 0",
        "train.dtype changed from fp32 to bf16: masters and moments are loaded exactly, weights "
        "are rounded again",
        f"data.train changed from {finished / 'tokens'} to elsewhere: continuing at the same "
        f"sample position",
    ]
