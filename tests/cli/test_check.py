"""`megatrain check` finds all that is wrong, each with a line that mends it, and changes nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers.checkout_paths import CONFIGS
from helpers.readme_commands import run as run_command
from test_configs import WRITTEN_FOR

from megatrain.__main__ import main
from megatrain.config import loader as configuration
from megatrain.data.indexed_dataset import IndexedWriter
from megatrain.models.config import load_hf_config, read_config
from megatrain.planner.memory import predict
from megatrain.planner.run_spec import Cluster, RunSpec

MODEL = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """A run that works, in the folder from which the command is given."""
    for name in (
        "DS_ACCELERATOR",
        "OMP_NUM_THREADS",
    ):  # so that what the command sets there is taken back
        monkeypatch.setenv(name, os.environ.get(name, "cpu" if name == "DS_ACCELERATOR" else "1"))
    with IndexedWriter(tmp_path / "data", vocab_size=67) as writer:
        for part in np.random.default_rng(0).integers(0, 67, (40, 20)):
            writer.add(part)
    raw = {
        "model": MODEL,
        "run": {"output_dir": "run"},
        "data": {"train": "data", "sequence_length": 16},
        "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.yaml"


class Said:
    """What the command said: exit code, lines, and errors with the line that mends each."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        self.errors = dict(re.findall(r"^error: (.*)\n(?:  fix: (.*)\n)?", err, re.MULTILINE))
        self.warnings = re.findall(r"^warning: (.*)", err, re.MULTILINE)


@pytest.fixture
def check(capfd):
    def run(file, *words):
        code = main(["check", str(file), *words])
        return Said(code, *capfd.readouterr())

    return run


def test_a_run_that_works(check, run_file):
    said = check(run_file)
    assert (said.code, said.errors, said.warnings, said.err) == (0, {}, [], "")
    assert said.out.splitlines()[-1] == "run: no errors found"
    assert "heaviest: " in said.out
    assert sorted(path.name for path in run_file.parent.iterdir()) == [
        "data.bin",
        "data.idx",
        "run.yaml",
    ]


MISTAKES = {
    "train.stepz=5 train.steps=null": "train.stepz=5 is not a setting; did you mean `steps`?",
    "train.steps=many": "train.steps=many must be a whole number or null, not text",
    "train.steps=null": "train.steps=null is missing",
    "train.tokens=500": "train.tokens=500 cannot be combined with train.steps=12",
    "optimizer.lr=.nan": "optimizer.lr=nan must be a finite number",
    "optimizer.betas=[2,3]": "optimizer.betas=[2.0, 3.0] must be two numbers in [0, 1)",
    "optimizer.name=adamv": "optimizer.name=adamv must be one of adamw, adam, sgd, lion",
    "lr_schedule.warmup_steps=40": "lr_schedule.warmup_steps=40 must be at most 12",
    "lr_schedule.min_lr=1": "lr_schedule.min_lr=1.0 must be at most optimizer.lr=0.0003",
    "parallel.tensor=3": "parallel.tensor=3 does not fit num_attention_heads=4",
    "parallel.pipeline=5": "parallel.pipeline=5 must be at most num_hidden_layers=4",
    "parallel.data=3": "train.global_batch_size=4 must be a multiple of train.micro_batch_size=2 x data size 3",
    "parallel.zero=2 parallel.pipeline=2": "parallel.zero=2 requires parallel.pipeline=1, not 2",
    "parallel.sequence=true": "parallel.sequence=true requires parallel.tensor of at least 2",
    "parallel.schedule=zbv parallel.pipeline=2": "parallel.schedule=zbv is not a schedule",
    "parallel.virtual=3 parallel.schedule=zb-v parallel.pipeline=2": "parallel.virtual=3 is not supported by parallel.schedule=zb-v (supported: 2)",
    "parallel.layers_per_stage=[1,2] parallel.pipeline=2": "parallel.layers_per_stage=[1, 2] ",
    "train.dtype=fp16": "train.dtype=fp16 requires a GPU",
    "checkpoint.keep_every=4": "checkpoint.keep_every=4 has no effect with checkpoint.keep_last=0",
    "profile.steps=[20,30]": "profile.steps=[20, 30] must end by step 12",
    "stability.on_loss_spike=rollback checkpoint.save_every=0": "stability.on_loss_spike=rollback requires checkpoints, but checkpoint.save_every=0",
    "eval.every=5": "data.valid=null names no data",
    "checkpoint.resume=nowhere": "checkpoint.resume=nowhere is not a folder",
    "data.sequence_length=65": "data.sequence_length=65 is more than the model's 64 positions",
    "data.packing=true": "data.packing=true is a setting of `megatrain finetune`",
    "lora.alpha=8": "lora.alpha=8.0 has no effect with lora.rank=0",
    "lora.rank=8": "lora.rank=8 requires train.init_from",
    "model.num_key_value_heads=3": "model.num_key_value_heads=3 does not divide num_attention_heads=4",
    "model.hidden_sise=16": "model.hidden_sise=16 is not a field of a llama config",
    "run.output_dir=/proc/run": "run.output_dir=/proc/run cannot be written",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_mended_by_the_line_to_paste(check, run_file, words):
    said = check(run_file, *words.split())
    assert said.code == 1
    (text,) = [text for text in said.errors if text.startswith(MISTAKES[words])]
    paste = said.errors[text]
    assert paste, f"nothing to paste for {text}"
    misspelt = "is not a setting" in text or "is not a field" in text
    kept = [word for word in words.split() if not (misspelt and text.startswith(word))]
    again = check(run_file, *kept, *paste.split())
    assert text not in again.errors
    assert again.code == 0 or set(again.errors) < set(said.errors) or words in MENDED_IN_TWO


def test_what_exporters_cannot_do_is_said_before(check, run_file):
    """Whether their libraries are there or not."""
    errors = check(run_file, "run.prometheus=x.txt").errors
    assert [
        paste
        for text, paste in errors.items()
        if text.startswith("run.prometheus=x.txt must end in .prom")
    ] == ["run.prometheus=x.txt.prom"]


MENDED_IN_TWO = ("eval.every=5",)
"""Validation data must be set by hand if not cut from the training data."""


def test_all_mistakes_at_once(check, run_file):
    """Of settings, layout, data, tokenizer, weights and output alike."""
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
    said = check(run_file, *words, "parallel.pipeline=2")  # which ZeRO 2 does not go with
    assert said.code == 1
    assert len(said.errors) >= len(words)
    for word in words:
        assert (
            any(text.startswith(word) for text in said.errors)
            or "=lost" in word
            or word.rpartition("=")[0] in said.err
        ), word
    assert all(said.errors.values())
    assert said.err.splitlines()[-1] == f"run: {len(said.errors)} errors"


def test_data_of_another_tokenizer(check, run_file):
    with IndexedWriter(run_file.parent / "other", vocab_size=1000) as writer:
        writer.add(np.arange(900, dtype=np.uint16))
    said = check(run_file, "data.train=other")
    (text,) = said.errors
    assert "outside the vocabulary of 67" in text


def test_data_that_are_damaged_or_missing(check, run_file):
    (run_file.parent / "data.bin").write_bytes(b"")
    assert "data.bin is 0 bytes long" in next(iter(check(run_file).errors))
    said = check(run_file, "data.train=nowhere", "data.tokenizer=words")
    assert (
        said.errors["data.train=nowhere does not exist"]
        == "megatrain preprocess TEXTS.jsonl --tokenizer words --output nowhere"
    )
    assert (
        said.errors["data.tokenizer=words does not exist"]
        == "megatrain train-tokenizer TEXTS.jsonl --vocab-size 67 --output words"
    )


def test_texts_instead_of_their_tokens(check, run_file):
    """It is there, so that it is not said to be missing; and made under its own name it would be the same again."""
    (run_file.parent / "texts.jsonl.gz").write_bytes(b"")
    said = check(
        run_file, "--verb", "pretrain", "data.train=texts.jsonl.gz", "data.tokenizer=words"
    )
    ((text, paste),) = [
        (text, paste) for text, paste in said.errors.items() if text.startswith("data.train=")
    ]
    assert text.startswith("data.train=texts.jsonl.gz is a file of texts")
    assert text.endswith("and give data.train=texts")
    assert paste == "megatrain preprocess texts.jsonl.gz --tokenizer words --output texts"


def test_a_wrong_start_is_one_mistake(check, run_file):
    """And not as many as there are things that would have come from it."""
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


def test_what_could_not_be_read_is_not_also_missing(check, run_file):
    """Steps that are no number, or are in a section that is none."""
    raw = yaml.safe_load(run_file.read_text())
    raw["train"]["steps"] = "thirty"
    run_file.write_text(yaml.safe_dump(raw))
    (text,) = check(run_file).errors
    assert text.startswith("train.steps=thirty must be a whole number")
    del raw["train"]["steps"]
    run_file.write_text(yaml.safe_dump(raw | {"trian": {"steps": 30}}))
    ((_, paste), *_) = check(run_file).errors.items()
    assert paste == "train.steps=30"


def test_a_world_that_the_layout_does_not_divide(check, run_file):
    said = check(
        run_file, "parallel.tensor=2", "parallel.pipeline=4", "--nodes", "3", "--gpus-per-node", "2"
    )
    text = "parallel=tensor 2 x pipeline 4 does not divide the 6 ranks of this run; start a multiple of 8 ranks"
    assert said.errors == {text: "parallel.pipeline=3"}
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


def test_tensor_groups_that_leave_a_machine(check, run_file):
    said = check(run_file, "parallel.tensor=4", "--nodes", "2", "--gpus-per-node", "2")
    assert said.code == 0
    assert len(said.warnings) == 1
    assert "parallel.tensor=2 parallel.pipeline=2 keeps them on one machine" in said.warnings[0]
    assert (
        check(run_file, "parallel.tensor=2", "--nodes", "2", "--gpus-per-node", "2").warnings == []
    )
    (words,) = check(
        run_file, "parallel.tensor=4", "parallel.pipeline=4", "--nodes", "8", "--gpus-per-node", "2"
    ).warnings
    assert words.endswith(
        "; parallel.tensor=2 keeps them on one machine"
    )  # there are no layers for 8 stages


def test_a_gpu_that_is_too_small(check, run_file):
    """The line to paste makes it fit; a GPU by name has its memory."""
    gib = re.search(
        r"heaviest: ([\d.]+) GiB",
        check(
            run_file, "--gpu-memory", "80", "data.sequence_length=64", "train.micro_batch_size=4"
        ).out,
    )
    assert gib is not None
    large = [
        "model.hidden_size=256",
        "model.intermediate_size=1024",
        "train.global_batch_size=64",
        "train.micro_batch_size=16",
        "data.sequence_length=64",
        "--gpus-per-node",
        "4",
        "--gpu-memory",
    ]
    said = check(run_file, *large, "0.1")
    ((text, paste),) = said.errors.items()
    assert text.startswith("the heaviest rank takes 0.")
    assert check(run_file, *large, "0.1", *paste.split()).code == 0
    assert "of a GPU's 141 on" in check(run_file, "--gpu-memory", "h200").out


def heaviest(said):
    return float(re.search(r"heaviest: ([\d.]+) GiB", said.out)[1])


def test_a_gpu_that_nothing_makes_fit(check, run_file):
    """By how much, and what was tried: which says as much as the same settings do by themselves."""
    words = ["model.hidden_size=512", "model.intermediate_size=2048", "--gpus-per-node", "2"]
    ((text, paste),) = check(run_file, *words, "--gpu-memory", "0.01GiB").errors.items()
    best, least, lacks, tried = re.search(
        r"fits: (.+) takes least, ([\d.]+) GiB, which is ([\d.]+) too much \(tried: (.*)\); use larger GPUs",
        text,
    ).groups()
    assert paste == ""
    assert float(lacks) == pytest.approx(float(least) - 0.01, abs=1e-3)
    assert best in tried.split("; ")
    assert {
        "train.micro_batch_size=1",
        "train.recompute=full",
        "parallel.tensor=2",
        "parallel.pipeline=2",
    } <= set(tried.split("; "))
    assert heaviest(check(run_file, *words, *best.split())) == pytest.approx(
        float(least), abs=0.006
    )


def test_a_gpu_that_is_filled_or_not_enough(check, run_file):
    """What leaves a GPU no room is said with that, and where one machine does not do, more are."""
    words = [
        "model.hidden_size=512",
        "model.intermediate_size=2048",
        "train.micro_batch_size=1",
        "train.recompute=full",
        "--gpus-per-node",
    ]
    alone, two, four = (
        heaviest(check(run_file, *words, str(ranks), f"parallel.pipeline={ranks}"))
        for ranks in (1, 2, 4)
    )
    ((text, paste),) = check(
        run_file,
        *words,
        "2",
        "parallel.pipeline=1",
        "parallel.data=2",
        "--gpu-memory",
        f"{two / 0.96}",
    ).errors.items()
    assert paste.split()[0] in ("parallel.tensor=2", "parallel.pipeline=2")
    assert re.search(
        r"9\d% of a GPU, but driver, .* need memory too \(tried: .*parallel.pipeline=2", text
    )
    said = check(run_file, *words, "2", *paste.split(), "--gpu-memory", f"{two / 0.96}")
    assert (said.code, len(said.warnings)) == (0, 1)
    assert four < two < alone
    ((text, paste),) = check(run_file, *words, "1", "--gpu-memory", f"{two * 0.99}").errors.items()
    assert paste == "parallel.pipeline=4 --nodes 4 --gpus-per-node 1"
    assert (
        check(run_file, *words, "1", "--gpu-memory", f"{two * 0.99}", *paste.split()).warnings == []
    )


def test_checkpoints_of_another_model(check, run_file):
    assert run_command("pretrain", run_file, "train.steps=0", folder=run_file.parent).code == 0
    (run_file.parent / "run-2").mkdir()
    assert check(run_file).code == 0
    said = check(run_file, "model.intermediate_size=64")
    ((text, paste),) = said.errors.items()
    assert "is of another model: its intermediate_size is 48 and the run's is 64" in text
    assert paste == "run.output_dir=run-3"
    assert check(run_file, "model.intermediate_size=64", paste).code == 0


def test_a_disk_that_is_too_small(check, run_file, monkeypatch):
    free = 14 * 39_584 * 5 // 2  # 14 bytes a parameter in bf16: two checkpoints and a half
    monkeypatch.setattr(
        "megatrain.planner.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=free)
    )
    words = ["train.dtype=bf16", "checkpoint.save_every=2", "checkpoint.keep_last=3"]
    ((text, paste),) = check(run_file, *words).errors.items()
    assert "and 4 checkpoints of " in text
    assert paste == "checkpoint.keep_last=1"
    assert check(run_file, *words, paste).code == 0


def test_epochs_whose_steps_the_data_say(check, run_file):
    """How many checkpoints there will be is then not known, unless few are kept."""
    words = ["--verb", "finetune", "train.steps=null", "train.epochs=2", "checkpoint.save_every=5"]
    said = check(run_file, *words)
    assert "  work    2 epochs, in steps of 64 tokens" in said.out
    assert (
        "one every 5 steps, and the number of steps depends on the data; checkpoint.keep_last=0 keeps all"
        in said.out
    )
    assert len(said.warnings) == 1
    assert said.warnings[0].endswith("; checkpoint.keep_last=3 keeps the newest three")
    said = check(run_file, *words, "checkpoint.keep_last=3")
    assert said.warnings == []
    assert "each, 4 at once;" in said.out
    assert "each, one;" in check(run_file, *words, "checkpoint.save_every=0").out


def test_weights_that_are_there_keep_their_tokenizer(check, run_file):
    """One trained anew would give the model's tokens other meanings."""
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


def test_what_finetuning_lacks_is_yours_to_fill(check, run_file):
    """The line to paste does not take it away once more."""
    lacks = check(run_file, "--verb", "finetune", "data.train=null").errors
    assert [paste for text, paste in lacks.items() if text.startswith("data.train=(nothing)")] == [
        "data.train=YOURS.jsonl"
    ]
    lacks = check(run_file, "--verb", "finetune", "data.train=chats.jsonl").errors
    assert [
        paste for text, paste in lacks.items() if text.startswith("data.tokenizer=(nothing)")
    ] == ["data.tokenizer=FOLDER_OF_THE_MODEL"]


def test_a_run_takes_what_was_said(tmp_path, run_file, check):
    """The checkpoint's size; and the metrics have the predicted memory beside what is measured."""

    said = check(run_file)
    ended = run_command(
        "pretrain", run_file, "train.steps=1", f"run.output_dir={tmp_path / 'run'}", folder=tmp_path
    )
    assert ended.code == 0, ended.err
    real = sum(
        path.stat().st_size
        for path in (tmp_path / "run/checkpoints/step-00000001").rglob("*.safetensors")
    )
    told = float(re.search(r"checkpoints: ([\d.]+) kB each", said.out)[1]) * 1e3
    assert told == pytest.approx(real, rel=0.05)
    (line,) = (
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    )
    config = configuration.load(run_file)
    model = read_config(load_hf_config(config.model))
    (memory,) = predict(RunSpec.create(config, model, Cluster(1, 1, "cpu")))
    assert line["memory_predicted_gib"] == memory.total / 2**30
    assert line["memory_gib"] is None or line["memory_gib"] > 0


@pytest.mark.parametrize("name", WRITTEN_FOR)
def test_each_config_lacks_nothing_but_its_files(name, check, monkeypatch, tmp_path):
    """And a command or setting stands by each of them; on the GPUs that it is written for it fits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatrain.models.quantize.metadata.version", lambda package: "99.0")
    monkeypatch.setattr(
        "megatrain.planner.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=10**15)
    )
    for variable in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(
            variable, os.environ.get(variable, "cpu" if variable == "DS_ACCELERATOR" else "1")
        )
    verb, ranks = "finetune" if name.startswith("finetune") else "pretrain", WRITTEN_FOR[name][0]
    nodes = max(1, ranks // 8)
    file = CONFIGS / f"{name}.yaml"
    said = check(
        file, "--nodes", str(nodes), "--gpus-per-node", str(ranks // nodes), "--gpu-memory", "H100"
    )
    assert said.out.startswith(f"megatrain {verb} ")
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
    assert set(said.errors) == wanted
    assert all(said.errors.values())
    assert said.warnings == []
    rows = [
        line.split() for line in said.out.splitlines() if re.match(r" +\d+(-\d+)? +\d+  ", line)
    ]
    assert sum(int(row[1]) for row in rows) == ranks
    assert list(tmp_path.iterdir()) == []


def test_4096_ranks(check, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = check(
        CONFIGS / "gpt_1t.yaml",
        "parallel.data=null",
        "train.global_batch_size=4096",
        "--nodes",
        "512",
        "--gpus-per-node",
        "8",
    )
    rows = [
        line.split() for line in said.out.splitlines() if re.match(r" +\d+(-\d+)? +\d+  ", line)
    ]
    assert [int(row[1]) for row in rows] == [64, 3968, 64]
    assert "on 4096 ranks, 512 x 8 GPUs" in said.out


def test_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    assert "before the queue" in " ".join(capsys.readouterr().out.split())
    assert Path(configuration.__file__).exists()
