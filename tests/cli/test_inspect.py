"""`megatrain inspect` describes a folder and checks that it is complete."""

import json
import os
import shutil

import pytest
from helpers.checkpoint_runs import pretrain_in_shards, settings
from helpers.megatron_layout import write_megatron
from helpers.rank_pool import run_ranks
from helpers.tiny_folders import LLAMA, make_folder, random_model
from helpers.training_runs import write_tokens

from megatrain.__main__ import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps at tensor 2 x pipeline 2, its model in several shards."""
    folder = tmp_path_factory.mktemp("inspected")
    write_tokens(folder / "tokens")
    raw = settings(
        folder, parallel={"tensor": 2, "pipeline": 2}, train={"steps": 2}, eval={"every": 0}
    )
    run_ranks(pretrain_in_shards, 4, raw, 10_000, folder=folder)
    return folder / "run"


def test_megatrain_checkpoint(run, capsys):
    assert main(["inspect", str(run)]) == 0
    output = capsys.readouterr().out
    assert f"{run / 'checkpoints' / 'step-00000002'}: megatrain checkpoint" in output
    assert "model      llama, 25,408 parameters, 0.000 GB in 29 tensors" in output
    assert "step 2, 128 tokens, 2 updates" in output
    assert "tensor 2, pipeline 2, data 1" in output
    assert "num_hidden_layers 3" in output
    assert "complete: the size of every file matches the manifest" in output
    line = next(
        line
        for line in output.splitlines()
        if line.startswith("model.layers.0-2.self_attn.q_proj.weight")
    )
    assert line.split()[1:6] == ["32", "x", "32", "float32", "3"]
    assert "optimizer/rank-00003.safetensors" in output or "optimizer/" in output
    assert main(["inspect", str(run), "--hashes"]) == 0
    assert "complete: the hash of every file matches the manifest" in capsys.readouterr().out


def test_json(run, capsys):
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["whole"]
    assert len(found["tensors"]) == 29
    assert found["parameters"] == sum(row["num_bytes"] for row in found["tensors"]) / 4 == 25_408
    assert found["trainer"]["step"] == 2
    assert found["config"]["hidden_size"] == 32


def test_damage_is_reported_and_exits_with_1(run, tmp_path, capsys):
    copy = shutil.copytree(run / "checkpoints" / "step-00000002", tmp_path / "copy")
    shard = sorted(copy.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(copy)]) == 0
    assert main(["inspect", str(copy), "--hashes"]) == 1
    assert (
        f"integrity  has other content in {shard.name} than was written" in capsys.readouterr().out
    )
    os.truncate(shard, 1000)
    assert main(["inspect", str(copy)]) == 1
    assert "is truncated or corrupt" in capsys.readouterr().err


def test_hugging_face_folder_without_a_layer(tmp_path, capsys):
    make_folder(tmp_path / "model", LLAMA)
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "complete: the tensors and shapes are those of the config" in capsys.readouterr().out
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert main(["inspect", str(tmp_path / "model")]) == 1
    assert "integrity" in (output := capsys.readouterr().out)
    assert "lacks model.layers.2." in output


def test_megatron_checkpoint(tmp_path, capsys):
    write_megatron(tmp_path / "run", random_model(LLAMA), tensor=2, pipeline=2)
    assert main(["inspect", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "Megatron-LM checkpoint, tensor 2 x pipeline 2 ranks" in output
    assert "mp_rank_01_001/model_optim_rng.pt" in output


def test_converted_checkpoint_has_no_layout(tmp_path, capsys):
    make_folder(tmp_path / "model", LLAMA)
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--no-verify"]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "\n  layout     none (converted, not written by a run)\n" in capsys.readouterr().out


def test_missing_folder(tmp_path, capsys):
    for words in (
        ["inspect", "nowhere"],
        ["convert", "nowhere", "out"],
        ["generate", "nowhere", "--prompt", "x"],
    ):
        assert main(words) == 1
        assert capsys.readouterr().err.startswith(
            "error: nowhere does not exist; give a checkpoint"
        )


def test_empty_folder(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "has no supported format" in capsys.readouterr().err
