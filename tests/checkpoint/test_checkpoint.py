"""Checkpoints are complete Hugging Face folders, and errors name the damage of others."""

from __future__ import annotations

import doctest
import hashlib
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
import yaml
from helpers import readme_commands
from helpers.checkpoint_runs import MODEL, VOCABULARY, pretrain_in_shards, settings
from helpers.messages import split_error
from helpers.rank_pool import run_ranks
from helpers.training_runs import pretrain, write_tokens

from megatrain.__main__ import main
from megatrain.checkpoint import manifest, resume, retention
from megatrain.checkpoint.checkpoint import Checkpoint
from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.config import loader as configuration
from megatrain.data.dataloader import DataLoader
from megatrain.data.gpt_dataset import open_dataset
from megatrain.errors import CheckpointError
from megatrain.models.config import load_hf_config, read_config
from megatrain.planner.run_spec import choose_start, describe_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps at tensor 2 x pipeline 2, with a checkpoint of several files at each."""
    folder = tmp_path_factory.mktemp("finished")
    write_tokens(folder / "tokens")
    raw = settings(folder, parallel={"tensor": 2, "pipeline": 2})
    run_ranks(pretrain_in_shards, 4, raw, 10_000, folder=folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished` that a test may damage."""
    shutil.copytree(finished / "run", tmp_path / "run")
    for suffix in (".bin", ".idx"):
        shutil.copy(finished / f"tokens{suffix}", tmp_path)
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(settings(tmp_path, parallel={"tensor": 2, "pipeline": 2}))
    )
    return tmp_path


def newest(folder):
    return sorted((folder / "run" / "checkpoints").glob("step-*"))[-1]


def test_transformers_loads_it_with_the_loss_of_the_run(finished):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        newest(finished), dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = configuration.load(finished / "run" / "config.yaml")
    samples = open_dataset(
        config.data, part="valid", sequence_length=16, seed=config.run.seed, vocab_size=VOCABULARY
    )
    loader = DataLoader(samples, global_batch_size=4, micro_batch_size=2, data_rank=0, data_size=1)
    batches = [batch for number in range(2) for batch in loader.microbatches(number)]
    loader.close()
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(
                model.eval()(b.tokens).logits.flatten(0, 1), b.labels.flatten()
            )
            for b in batches
        ]
    last = json.loads((finished / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(torch.stack(losses).mean()) == pytest.approx(last["valid_loss"], rel=2e-6)


def test_each_tensor_is_in_one_file_without_padding(finished):
    from safetensors import safe_open

    folder = newest(finished)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    found = {}
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found
                found[name] = file.get_tensor(name)
                assert index["weight_map"][name] == shard
    assert set(found) == set(index["weight_map"])
    assert found["model.embed_tokens.weight"].shape == (VOCABULARY, 32)
    assert "lm_head.weight" not in found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_manifest_lists_all_files_and_none_is_pickled(finished):
    folder = newest(finished)
    listed = {
        entry["path"]: entry
        for entry in json.loads((folder / "manifest.json").read_text())["files"]
    }
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) - {"manifest.json"} == set(listed)
    for name, entry in listed.items():
        assert entry["size"] == files[name].stat().st_size
        assert entry["sha256"] == hashlib.sha256(files[name].read_bytes()).hexdigest()
    assert {path.suffix for path in files.values()} == {".json", ".safetensors"}


def edit_manifest(change):
    def damage(folder):
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return damage


DAMAGES = {
    "has format 99; this version of megatrain reads formats up to 3": edit_manifest(
        lambda content: content.update(format=99)
    ),
    "../config.json is outside the folder": edit_manifest(
        lambda content: content["files"][0].update(path="../config.json")
    ),
    "/etc/hostname is outside the folder": edit_manifest(
        lambda content: content["files"][0].update(path="/etc/hostname")
    ),
    "lacks config.json": lambda folder: (folder / "config.json").unlink(),
    "bytes in optimizer/rank-00001.safetensors instead of": lambda folder: os.truncate(
        folder / "optimizer" / "rank-00001.safetensors", 100
    ),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "has an unreadable manifest.json": lambda folder: (folder / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_find_newest_skips_damaged_checkpoints_with_a_reason(run, sentence):
    DAMAGES[sentence](newest(run))
    (run / "run" / "checkpoints" / ".tmp-step-00000009").mkdir()
    newest_complete, skipped = manifest.find_newest(run / "run" / "checkpoints")
    assert newest_complete is not None
    assert newest_complete.name == "step-00000002"
    (reason,) = skipped
    assert reason.startswith("step-00000003 ")
    assert sentence in reason


def refusal(run, capfd, monkeypatch, *overrides):
    """Returns the error that the command prints before it would start ranks."""
    monkeypatch.setattr(
        "megatrain.cli.train.run_local", lambda *args, **more: pytest.fail("ranks were started")
    )
    assert main(["pretrain", str(run / "run.yaml"), *overrides]) == 1
    message, _ = split_error(capfd.readouterr().err)
    return message


def test_resume_from_a_missing_folder_is_refused(run, capfd, monkeypatch):
    assert "checkpoint.resume=/nowhere is not a folder; use a checkpoint's folder" in refusal(
        run, capfd, monkeypatch, "checkpoint.resume=/nowhere"
    )


def test_resume_from_a_corrupt_folder_is_refused(run, capfd, monkeypatch):
    damaged = newest(run) / "optimizer" / "rank-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    error = refusal(run, capfd, monkeypatch, f"checkpoint.resume={newest(run)}")
    assert "has other content in optimizer/rank-00002.safetensors than was written" in error


@pytest.mark.parametrize("overrides", [(), ("checkpoint.resume=NEWEST",)], ids=["auto", "named"])
def test_resume_with_another_model_is_refused(run, capfd, monkeypatch, overrides):
    overrides = [override.replace("NEWEST", str(newest(run))) for override in overrides]
    error = refusal(run, capfd, monkeypatch, *overrides, "model.intermediate_size=64")
    assert "is of another model: its intermediate_size is 48 and the run's is 64" in error


def test_restart_of_a_finished_run_changes_nothing(run):
    before = {
        path: path.read_bytes()
        for path in (run / "run" / "checkpoints").rglob("*")
        if path.is_file()
    }
    metrics = (run / "run" / "metrics.jsonl").read_text()
    done = readme_commands.run("pretrain", run / "run.yaml", folder=run)
    assert done.code == 0, done
    assert "resuming from" in done.out
    assert {
        path: path.read_bytes()
        for path in (run / "run" / "checkpoints").rglob("*")
        if path.is_file()
    } == before
    assert (run / "run" / "metrics.jsonl").read_text() == metrics


def test_a_run_of_no_steps_saves_the_initial_model(tmp_path):
    from transformers import AutoModelForCausalLM

    write_tokens(tmp_path / "tokens")
    raw = settings(tmp_path, train={"steps": 0}, eval={"every": 1}, checkpoint={"keep_last": 1})
    run_ranks(pretrain, 1, raw, folder=tmp_path)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert folder.name == "step-00000000"
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 10_000
    (line,) = [
        json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert line["step"] == 0
    assert line["valid_loss"] == pytest.approx(np.log(VOCABULARY), rel=0.02)


def test_keep_last_keeps_the_newest_checkpoints(tmp_path):
    write_tokens(tmp_path / "tokens")
    run_ranks(
        pretrain,
        1,
        settings(tmp_path, train={"steps": 5}, checkpoint={"keep_last": 2}, eval={"every": 0}),
        folder=tmp_path,
    )
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000005",
    ]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system with room for one checkpoint but not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=640k", "none", folder], check=False
        ).returncode
    ):
        pytest.skip("mounting a file system requires root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_but_not_the_previous_checkpoint(small_disk, tmp_path):
    write_tokens(tmp_path / "tokens")
    raw = settings(tmp_path, eval={"every": 0}, run={"output_dir": str(small_disk / "run")})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    ended = readme_commands.run("pretrain", tmp_path / "run.yaml", folder=tmp_path)
    assert ended.code == 1
    assert "could not write the checkpoint" in ended.err
    assert "No space left on device" in ended.err
    assert "Traceback" not in ended.err
    (kept,) = (small_disk / "run" / "checkpoints").iterdir()
    assert kept.name == "step-00000001"
    assert manifest.find_problem(kept, hashes=True) is None


# -- class Checkpoint, old formats -----------------------------------------------------------------


def test_example_of_checkpoint(finished):
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(Checkpoint, globs={"run": finished / "run"})
    assert doctest.DocTestRunner().run(example).failed == 0


def test_checkpoint_reads_tensors_lazily(run):
    checkpoint = Checkpoint(newest(run))
    folder = HFFolder(newest(run))
    assert list(checkpoint.tensors) == folder.names()
    assert all(torch.equal(checkpoint.tensors[name], folder.read(name)) for name in folder.names())
    assert "lm_head.weight" not in checkpoint.tensors
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        checkpoint.tensors["lm_head.weight"]


def test_checkpoint_verify_names_the_damage(run):
    damaged = newest(run) / "optimizer" / "rank-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    checkpoint = Checkpoint(newest(run))
    checkpoint.verify("sizes")
    with pytest.raises(CheckpointError, match=r"other content in optimizer/rank-00002"):
        checkpoint.verify()
    os.truncate(damaged, 100)
    with pytest.raises(CheckpointError, match=r"has 100 bytes in optimizer/rank-00002"):
        checkpoint.verify("sizes")
    assert Checkpoint(run / "run").step == 2, "the newest complete one"
    shutil.rmtree(run / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="must be the folder of a checkpoint or of a run"):
        Checkpoint(run / "run")


def test_a_checkpoint_of_the_old_format_is_read(run):
    folder = newest(run)
    (folder / "train_state.json").rename(folder / "trainer.json")
    content = json.loads((folder / "manifest.json").read_text())
    content["format"] = 2
    for entry in content["files"]:
        entry["path"] = entry["path"].replace("train_state.json", "trainer.json")
    (folder / "manifest.json").write_text(json.dumps(content))
    (run / "run" / "best.json").write_text('{"step": 3, "metric": "valid_loss", "value": 1.0}')
    checkpoint = Checkpoint(run / "run")
    checkpoint.verify()
    assert (checkpoint.path, checkpoint.step) == (folder, 3)
    assert retention.find_best(run / "run") == folder
    config = configuration.load(run / "run.yaml")
    path, _ = choose_start(config, hashes=True)
    assert path == folder
    resume.check(path, describe_run(config, read_config(load_hf_config(MODEL)), data_size=1))
    retention.write_best(run / "run", step=2, metric="valid_loss", value=0.5)
    assert retention.find_best(run / "run").name == "step-00000002"
    assert not (run / "run" / "best.json").exists()
