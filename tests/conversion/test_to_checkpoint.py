"""Runs resume from converted checkpoints, with the losses of init_from or of the original run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.rank_pool import run_ranks
from helpers.tiny_folders import GPT2, LLAMA, convert, make_folder, tensors_of
from helpers.training_runs import losses, pretrain, write_tokens
from safetensors.torch import load_file

from megatrain.checkpoint import manifest

MODELS = {
    "llama": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {**GPT2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tokens, and each model as transformers saves it."""
    folder = tmp_path_factory.mktemp("targets")
    write_tokens(folder / "tokens")
    for name, fields in MODELS.items():
        make_folder(folder / name, fields)
    return folder


def pretrain_all(rank, world_size, raws):
    for raw in raws:
        pretrain(rank, world_size, raw)


def settings(root, output, *, parallel=None, checkpoint=None, **train):
    train = {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2, **train}
    return {
        "run": {"output_dir": str(output)},
        "train": train,
        "checkpoint": checkpoint or {},
        "data": {"train": str(root / "tokens"), "sequence_length": 16},
        "optimizer": {"lr": 1e-2},
        "parallel": parallel or {},
    }


ROWS = [
    ("llama", 4, "fp32", {"tensor": 2, "pipeline": 2}),
    ("gpt_neox", 4, "fp32", {"tensor": 2, "pipeline": 2}),
    ("gpt2", 2, "fp32", {"tensor": 2}),
    ("llama", 2, "bf16", {"zero": 3}),
    ("gpt2", 2, "fp32", {"zero": 2}),
]


def test_resuming_a_converted_folder_equals_init_from(root, tmp_path, capfd):
    for name in MODELS:
        assert convert(root / name, tmp_path / name, "--max-shard-size", "20KB") == 0, (
            capfd.readouterr().err
        )
        output = capfd.readouterr().out
        assert "target    checkpoint with master of the optimizer after 0 updates" in output
        assert manifest.find_problem(tmp_path / name, hashes=True) is None
        assert (tmp_path / name / "train_state.json").is_file()
    for world_size in (4, 2):
        runs = []
        for number, (name, size, dtype, parallel) in enumerate(ROWS):
            if size == world_size:
                for way, sections in (
                    ("init", {"init_from": str(root / name)}),
                    ("resume", {"checkpoint": {"resume": str(tmp_path / name)}}),
                ):
                    raw = settings(
                        root,
                        tmp_path / f"{way}-{number}",
                        parallel=parallel,
                        dtype=dtype,
                        **sections,
                    )
                    runs.append({**raw, "model": str(root / name)})
        run_ranks(pretrain_all, world_size, runs, folder=tmp_path)
    for number in range(len(ROWS)):
        assert len(losses(tmp_path / f"init-{number}")) == 2
        assert losses(tmp_path / f"resume-{number}") == losses(tmp_path / f"init-{number}")
        assert losses(tmp_path / f"init-{number}")[0] != losses(tmp_path / f"init-{number}")[1]


def test_round_trip_keeps_bytes(root, tmp_path):
    assert convert(root / "gpt2", tmp_path / "ours") == 0
    assert convert(tmp_path / "ours", tmp_path / "theirs") == 0
    assert tensors_of(tmp_path / "theirs") == tensors_of(root / "gpt2")
    figures = json.loads((tmp_path / "ours" / "conversion.json").read_text())["proof"]
    assert (figures["source_computed_by"], figures["target_computed_by"]) == (
        "transformers",
        "our layers",
    )


def test_master_weights_keep_the_original_precision(root, tmp_path):
    assert convert(root / "llama", tmp_path / "ours", "--dtype", "bf16") == 0
    masters = load_file(tmp_path / "ours" / "optimizer" / "rank-00000.safetensors")
    exact = {
        name: np.frombuffer(held, np.float32)
        for name, (_, _, held) in tensors_of(root / "llama").items()
    }
    for key, master in masters.items():
        assert np.array_equal(master.numpy(), exact[key.partition("[")[0]])
    assert {dtype for dtype, _, _ in tensors_of(tmp_path / "ours").values()} == {torch.bfloat16}


# DeepSpeed's universal checkpoints.


@pytest.fixture(scope="module")
def universal(root, tmp_path_factory):
    """A run of four steps, and its state after two as a universal checkpoint."""
    folder = tmp_path_factory.mktemp("universal")
    run_ranks(
        pretrain_all,
        1,
        [
            {
                **settings(root, folder / "run", steps=4, checkpoint={"save_every": 2}),
                "model": MODELS["llama"],
            }
        ],
        folder=folder,
    )
    ours = folder / "run" / "checkpoints" / "step-00000002"
    shapes = {name: shape for name, (_, shape, _) in tensors_of(ours).items()}
    for key, tensor in load_file(ours / "optimizer" / "rank-00000.safetensors").items():
        name, state = key.partition("[")[0], key.rpartition("/")[2]
        place = folder / "zero" / f"module.{name}"
        place.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"param": tensor.view(shapes[name]), "cat_dim": 0},
            place / f"{'fp32' if state == 'master' else state}.pt",
        )
        torch.save(torch.tensor(2.0), place / "step.pt")
    torch.save({"param_groups": [{"lr": 0.01}]}, folder / "zero" / "optimizer_state.pt")
    shutil.copytree(
        folder / "zero" / "module.model.embed_tokens.weight",
        folder / "zero" / "module.lm_head.weight",
    )
    return folder


def test_resuming_a_universal_checkpoint_equals_its_run(root, universal, tmp_path, capfd):
    assert convert(universal, tmp_path / "ours", "--config", root / "llama") == 0, (
        capfd.readouterr().err
    )
    output = capfd.readouterr().out
    assert "DeepSpeed universal checkpoint (llama)" in output
    assert "checkpoint with master, exp_avg, exp_avg_sq of the optimizer after 2 updates" in output
    run_ranks(
        pretrain_all,
        1,
        [
            {
                **settings(
                    root, tmp_path / "run", steps=4, checkpoint={"resume": str(tmp_path / "ours")}
                ),
                "model": MODELS["llama"],
            }
        ],
        folder=tmp_path,
    )
    assert len(losses(tmp_path / "run", after=2)) == 2
    assert losses(tmp_path / "run", after=2) == losses(universal / "run", after=2)


def test_universal_checkpoint_to_hugging_face(root, universal, tmp_path):
    assert (
        convert(
            universal,
            tmp_path / "theirs",
            "--config",
            root / "llama",
            "--to",
            "hf",
            "--dtype",
            "bf16",
        )
        == 0
    )
    assert not (tmp_path / "theirs" / "optimizer").exists()
    assert {dtype for dtype, _, _ in tensors_of(tmp_path / "theirs").values()} == {torch.bfloat16}


NORM = "zero/module.model.norm.weight"
DAMAGES = {
    "lacks model.norm.weight": lambda folder: shutil.rmtree(folder / NORM),
    "lacks fp32.pt": lambda folder: (folder / NORM / "fp32.pt").unlink(),
    "lacks exp_avg.pt of model.norm.weight, but has it for others": lambda folder: (
        folder / NORM / "exp_avg.pt"
    ).unlink(),
    "step.pt is missing": lambda folder: (folder / NORM / "step.pt").unlink(),
    "contain different or invalid numbers of updates": lambda folder: torch.save(
        torch.tensor(3.0), folder / NORM / "step.pt"
    ),
    "of shape (30,)": lambda folder: torch.save(
        {"param": torch.ones(30)}, folder / NORM / "fp32.pt"
    ),
    "exp_avg.pt has shape (31,)": lambda folder: torch.save(
        {"param": torch.ones(31)}, folder / NORM / "exp_avg.pt"
    ),
    "does not contain a plain tensor": lambda folder: torch.save(
        {"param": [1]}, folder / NORM / "fp32.pt"
    ),
    "which the llama of its config does not have": lambda folder: shutil.copytree(
        folder / NORM, folder / "zero" / "module.model.other.weight"
    ),
    "with other values than the embedding": lambda folder: torch.save(
        {"param": torch.ones(67, 32)}, folder / "zero/module.lm_head.weight/fp32.pt"
    ),
    "with the prefix module. and without": lambda folder: shutil.copytree(
        folder / NORM, folder / "zero" / "model.norm.weight"
    ),
    "is damaged, or contains more than tensors": lambda folder: torch.save(
        {"param": Path("x")}, folder / NORM / "fp32.pt"
    ),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_damaged_universal_checkpoint_is_rejected(sentence, root, universal, tmp_path, capfd):
    shutil.copytree(universal / "zero", tmp_path / "copy" / "zero")
    DAMAGES[sentence](tmp_path / "copy")
    assert convert(tmp_path / "copy", tmp_path / "out", "--config", root / "llama") == 1
    err = capfd.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_universal_checkpoint_requires_a_config(universal, tmp_path, capfd):
    assert convert(universal, tmp_path / "out") == 1
    assert "name its Hugging Face config with --config" in capfd.readouterr().err
