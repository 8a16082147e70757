"""`megatrain check` finds all errors of a run, each with a fix, and changes nothing on disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers.checkout_paths import CONFIGS
from helpers.readme_commands import run as run_command
from helpers.shipped_configs import WRITTEN_FOR

from megatrain.__main__ import main
from megatrain.config import loader as configuration
from megatrain.data.indexed_dataset import IndexedWriter


def test_valid_run(check, run_file):
    result = check(run_file)
    assert (result.code, result.errors, result.warnings, result.err) == (0, {}, [], "")
    assert result.out.splitlines()[-1] == "run: no errors found"
    assert "heaviest: " in result.out
    assert sorted(path.name for path in run_file.parent.iterdir()) == [
        "data.bin",
        "data.idx",
        "run.yaml",
    ]


INVALID = {
    "train.stepz=5 train.steps=null": "train.stepz=5",
    "train.steps=many": "train.steps=many",
    "train.steps=null": "train.steps=null",
    "train.tokens=500": "train.tokens=500",
    "optimizer.lr=.nan": "optimizer.lr=nan",
    "optimizer.betas=[2,3]": "optimizer.betas=[2.0,",
    "optimizer.name=adamv": "optimizer.name=adamv",
    "lr_schedule.warmup_steps=40": "lr_schedule.warmup_steps=40",
    "lr_schedule.min_lr=1": "lr_schedule.min_lr=1.0",
    "parallel.tensor=3": "parallel.tensor=3",
    "parallel.pipeline=5": "parallel.pipeline=5",
    "parallel.data=3": "train.global_batch_size=4",
    "parallel.zero=2 parallel.pipeline=2": "parallel.zero=2",
    "parallel.sequence=true": "parallel.sequence=true",
    "parallel.schedule=zbv parallel.pipeline=2": "parallel.schedule=zbv",
    "parallel.virtual=3 parallel.schedule=zb-v parallel.pipeline=2": "parallel.virtual=3",
    "parallel.layers_per_stage=[1,2] parallel.pipeline=2": "parallel.layers_per_stage=[1,",
    "train.dtype=fp16": "train.dtype=fp16",
    "checkpoint.keep_every=4": "checkpoint.keep_every=4",
    "profile.steps=[20,30]": "profile.steps=[20,",
    "stability.on_loss_spike=rollback checkpoint.save_every=0": "stability.on_loss_spike=rollback",
    "eval.every=5": "data.valid=null",
    "checkpoint.resume=nowhere": "checkpoint.resume=nowhere",
    "data.sequence_length=65": "data.sequence_length=65",
    "data.packing=true": "data.packing=true",
    "lora.alpha=8": "lora.alpha=8.0",
    "lora.rank=8": "lora.rank=8",
    "model.num_key_value_heads=3": "model.num_key_value_heads=3",
    "model.hidden_sise=16": "model.hidden_sise=16",
    "run.output_dir=/proc/run": "run.output_dir=/proc/run",
}


@pytest.mark.parametrize("words", INVALID)
def test_fix_removes_the_error(check, run_file, words):
    result = check(run_file, *words.split())
    assert result.code == 1
    (text,) = [text for text in result.errors if text.startswith(INVALID[words])]
    fix = result.errors[text]
    assert fix, f"no fix for {text}"
    is_misspelled = "is not a setting" in text or "is not a field" in text
    kept = [word for word in words.split() if not (is_misspelled and text.startswith(word))]
    again = check(run_file, *kept, *fix.split())
    assert text not in again.errors
    assert again.code == 0 or set(again.errors) < set(result.errors) or words in FIXED_IN_TWO_STEPS


def test_exporters(check, run_file):
    """Errors do not depend on installed libraries."""
    errors = check(run_file, "run.prometheus=x.txt").errors
    assert [
        fix
        for text, fix in errors.items()
        if text.startswith("run.prometheus=x.txt must end in .prom")
    ] == ["run.prometheus=x.txt.prom"]


FIXED_IN_TWO_STEPS = ("eval.every=5",)


"""Evaluation needs data, which the fix cannot know."""


def test_all_errors_at_once(check, run_file):
    """Settings, layout, data, tokenizer, weights and output are all checked."""
    words = [
        "train.stepz=5",
        "optimizer.lr=-1",
        "optimizer.betas=[0.9]",
        "parallel.tensor=3",
        "train.dtype=fp17",
        "data.train=nowhere",
        "data.tokenizer=lost",
        "train.init_from=gone",
        "data.sequence_length=100",
        "run.output_dir=/proc/run",
        "lr_schedule.min_lr=-1",
        "checkpoint.resume=lost",
        "parallel.zero=2",
        "parallel.autotune_memory_gib=5",
    ]
    result = check(run_file, *words, "parallel.pipeline=2")  # conflicts with ZeRO 2
    assert result.code == 1
    assert len(result.errors) >= len(words)
    for word in words:
        assert (
            any(text.startswith(word) for text in result.errors)
            or "=lost" in word
            or word.rpartition("=")[0] in result.err
        ), word
    assert all(result.errors.values())
    assert result.err.splitlines()[-1] == f"run: {len(result.errors)} errors"


def test_data_of_another_tokenizer(check, run_file):
    with IndexedWriter(run_file.parent / "other", vocab_size=1000) as writer:
        writer.add(np.arange(900, dtype=np.uint16))
    result = check(run_file, "data.train=other")
    (text,) = result.errors
    assert "outside the vocabulary of 67" in text


def test_damaged_or_missing_data(check, run_file):
    (run_file.parent / "data.bin").write_bytes(b"")
    assert "data.bin is 0 bytes long" in next(iter(check(run_file).errors))
    result = check(run_file, "data.train=nowhere", "data.tokenizer=words")
    assert (
        result.errors["data.train=nowhere does not exist"]
        == "megatrain preprocess TEXTS.jsonl --tokenizer words --output nowhere"
    )
    assert (
        result.errors["data.tokenizer=words does not exist"]
        == "megatrain train-tokenizer TEXTS.jsonl --vocab-size 67 --output words"
    )


def test_texts_instead_of_tokens(check, run_file):
    """The command preprocesses the texts under another name."""
    (run_file.parent / "texts.jsonl.gz").write_bytes(b"")
    result = check(
        run_file, "--verb", "pretrain", "data.train=texts.jsonl.gz", "data.tokenizer=words"
    )
    ((text, fix),) = [
        (text, fix) for text, fix in result.errors.items() if text.startswith("data.train=")
    ]
    assert text.startswith("data.train=texts.jsonl.gz must be an indexed dataset")
    assert text.endswith("set data.train=texts")
    assert fix == "megatrain preprocess texts.jsonl.gz --tokenizer words --output texts"


def test_missing_init_from_is_one_error(check, run_file):
    """Model and tokenizer, which default to it, are not reported too."""
    raw = yaml.safe_load(run_file.read_text())
    del raw["model"]
    run_file.write_text(yaml.safe_dump(raw))
    (run_file.parent / "base").mkdir()
    (run_file.parent / "chats.jsonl").write_text("{}")
    for words in (["--verb", "pretrain"], ["--verb", "finetune", "data.train=chats.jsonl"]):
        assert check(run_file, *words, "train.init_from=bsae").errors == {
            "train.init_from=bsae does not exist; did you mean `base`?": "train.init_from=base"
        }
    assert check(run_file, "train.init_from=other").errors == {
        "train.init_from=other does not exist": "megatrain convert SOURCE other"
    }


def test_unreadable_setting_is_not_also_missing(check, run_file):
    """Steps that are text, or in an unknown section."""
    raw = yaml.safe_load(run_file.read_text())
    raw["train"]["steps"] = "thirty"
    run_file.write_text(yaml.safe_dump(raw))
    (text,) = check(run_file).errors
    assert text.startswith("train.steps=thirty must be a whole number")
    del raw["train"]["steps"]
    run_file.write_text(yaml.safe_dump(raw | {"trian": {"steps": 30}}))
    ((_, fix), *_) = check(run_file).errors.items()
    assert fix == "train.steps=30"


def test_world_size_that_the_layout_does_not_divide(check, run_file):
    result = check(
        run_file, "parallel.tensor=2", "parallel.pipeline=4", "--nodes", "3", "--gpus-per-node", "2"
    )
    text = (
        "parallel=tensor 2 x pipeline 4 does not divide the 6 ranks of this run; "
        "start a multiple of 8 ranks"
    )
    assert result.errors == {text: "parallel.pipeline=3"}
    assert (
        check(
            run_file,
            "parallel.tensor=2",
            "parallel.pipeline=3",
            "--nodes",
            "3",
            "--gpus-per-node",
            "2",
        ).code
        == 0
    )
    assert (
        check(run_file, "--nodes", "2").err
        == "error: --nodes requires --gpus-per-node, the number of ranks per machine\n"
    )


def test_tensor_groups_that_span_machines(check, run_file):
    result = check(run_file, "parallel.tensor=4", "--nodes", "2", "--gpus-per-node", "2")
    assert result.code == 0
    assert len(result.warnings) == 1
    assert "parallel.tensor=2 parallel.pipeline=2 keeps them on one machine" in result.warnings[0]
    assert (
        check(run_file, "parallel.tensor=2", "--nodes", "2", "--gpus-per-node", "2").warnings == []
    )
    (words,) = check(
        run_file, "parallel.tensor=4", "parallel.pipeline=4", "--nodes", "8", "--gpus-per-node", "2"
    ).warnings
    assert words.endswith(
        "; parallel.tensor=2 keeps them on one machine"
    )  # the model has fewer than 8 blocks


def test_checkpoint_of_another_model(check, run_file):
    assert run_command("pretrain", run_file, "train.steps=0", folder=run_file.parent).code == 0
    (run_file.parent / "run-2").mkdir()
    assert check(run_file).code == 0
    result = check(run_file, "model.intermediate_size=64")
    ((text, fix),) = result.errors.items()
    assert "is of another model: its intermediate_size is 48 and the run's is 64" in text
    assert fix == "run.output_dir=run-3"
    assert check(run_file, "model.intermediate_size=64", fix).code == 0


def test_pretrained_weights_keep_their_tokenizer(check, run_file):
    """A new tokenizer would assign other meanings to token ids."""
    base = run_file.parent / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    lost = "data.tokenizer=words does not exist"
    assert (
        check(run_file, "data.tokenizer=words", "train.init_from=base").errors[lost]
        == "data.tokenizer=base"
    )
    assert (
        check(run_file, "data.tokenizer=words", "lora.rank=4").errors[lost]
        == "data.tokenizer=FOLDER_OF_THE_MODEL"
    )


def test_placeholders_of_missing_finetuning_data(check, run_file):
    """The fix contains a placeholder, not the default."""
    errors = check(run_file, "--verb", "finetune", "data.train=null").errors
    assert "data.train=YOURS.jsonl" in errors.values()
    errors = check(run_file, "--verb", "finetune", "data.train=chats.jsonl").errors
    assert "data.tokenizer=FOLDER_OF_THE_MODEL" in errors.values()


@pytest.mark.parametrize("name", WRITTEN_FOR)
def test_configs_lack_only_their_files(name, check, monkeypatch, tmp_path):
    """Each missing file has a fix, and the run fits on its GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatrain.models.quantize.metadata.version", lambda package: "99.0")
    monkeypatch.setattr(
        "megatrain.planner.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=10**15)
    )
    for variable in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(
            variable, os.environ.get(variable, "cpu" if variable == "DS_ACCELERATOR" else "1")
        )
    command, ranks = "finetune" if name.startswith("finetune") else "pretrain", WRITTEN_FOR[name][0]
    nodes = max(1, ranks // 8)
    file = CONFIGS / f"{name}.yaml"
    result = check(
        file, "--nodes", str(nodes), "--gpus-per-node", str(ranks // nodes), "--gpu-memory", "H100"
    )
    assert result.out.startswith(f"megatrain {command} ")
    loaded = configuration.load(file)
    wanted = {
        f"data.train={loaded.data.train} does not exist",
        f"data.tokenizer={loaded.data.tokenizer} does not exist",
    }
    wanted |= {f"data.valid={loaded.data.valid} does not exist"} if loaded.eval.every else set()
    wanted |= (
        {f"train.init_from={loaded.train.init_from} does not exist"}
        if loaded.train.init_from
        else set()
    )
    assert set(result.errors) == wanted
    assert all(result.errors.values())
    assert result.warnings == []
    rows = [
        line.split() for line in result.out.splitlines() if re.match(r" +\d+(-\d+)? +\d+  ", line)
    ]
    assert sum(int(row[1]) for row in rows) == ranks
    assert list(tmp_path.iterdir()) == []


def test_4096_ranks(check, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = check(
        CONFIGS / "gpt_1t.yaml",
        "parallel.data=null",
        "train.global_batch_size=4096",
        "--nodes",
        "512",
        "--gpus-per-node",
        "8",
    )
    rows = [
        line.split() for line in result.out.splitlines() if re.match(r" +\d+(-\d+)? +\d+  ", line)
    ]
    assert [int(row[1]) for row in rows] == [64, 3968, 64]
    assert "on 4096 ranks, 512 x 8 GPUs" in result.out


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    assert "check a run before it waits in the queue" in " ".join(capsys.readouterr().out.split())
    assert Path(configuration.__file__).exists()
