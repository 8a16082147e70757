"""Invalid input is refused with a sentence, a fix and exit code 1; mostly before ranks start."""

from __future__ import annotations

import json
import os
import struct

import pytest
import yaml
from helpers.messages import split_error
from helpers.small_run import CONFIG, LENGTH, write_data

from megatrain.__main__ import main
from megatrain.config.loader import load
from megatrain.errors import ConfigError
from megatrain.training.preflight import check_start
from megatrain.training.task import PretrainingTask


@pytest.fixture
def run_file(tmp_path):
    """The file of a valid run."""
    write_data(tmp_path / "data")
    raw = {
        **CONFIG,
        "run": {"output_dir": str(tmp_path / "run")},
        "data": {**CONFIG["data"], "train": str(tmp_path / "data")},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


class RankStarted(Exception):
    pass


@pytest.fixture
def refusal(run_file, capfd, monkeypatch):
    """Returns a function that runs the command with overrides and returns its error message."""

    def start(*args, **more):
        raise RankStarted

    monkeypatch.setattr("megatrain.cli.train.run_local", start)
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):  # restored after the test
        monkeypatch.setenv(name, os.environ.get(name, "cpu" if name == "DS_ACCELERATOR" else "1"))

    def refuse(*overrides):
        assert main(["pretrain", str(run_file), *overrides]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        message, _ = split_error(err)
        return message

    return refuse


def test_valid_run_starts(refusal):
    with pytest.raises(RankStarted):
        refusal()


MESSAGES = [
    ("train.stepz=5", "train.stepz=5 is not a setting; did you mean `steps`?"),
    ("trian.steps=5", "trian={'steps': 5} is not a section of the config; did you mean `train`?"),
    ("train.steps=many", "train.steps=many must be a whole number or null, not text"),
    ("train.tokens=.inf", "train.tokens=inf must be a whole number or null, not a number"),
    ("optimizer.lr=.nan", "optimizer.lr=nan must be a finite number"),
    ("model.num_layers=4", "model.num_layers=4 is not a field of a llama config; did you mean"),
    (
        "model.num_hidden_layers=four",
        (
            "model=(llama fields) is refused by transformers: Validation error for field "
            "'num_hidden_layers'"
        ),
    ),
    ("model.model_type=bert", "model.model_type=bert is not supported (supported: gpt2, "),
    (
        "model=nowhere",
        "model=nowhere does not exist; give a folder, a config.json, or fields with model_type",
    ),
    ("model.hidden_act=relu2", "model.hidden_act=relu2 is not supported (supported: silu, "),
    # layouts that do not fit the model
    (
        "parallel.tensor=3",
        (
            "parallel.tensor=3 must divide num_attention_heads=4 and intermediate_size=48, and "
            "must divide num_key_value_heads=2"
        ),
    ),
    ("parallel.tensor=8", "parallel.tensor=8 must divide num_attention_heads=4"),
    (
        "model.num_key_value_heads=3",
        "model.num_key_value_heads=3 must divide num_attention_heads=4",
    ),
    ("parallel.pipeline=5", "parallel.pipeline=5 must be at most num_hidden_layers=4"),
    (
        "data.sequence_length=65",
        "data.sequence_length=65 is more than the model's 64 positions; use at most 64",
    ),
    # batches that do not divide
    (
        "train.micro_batch_size=3",
        ("train.global_batch_size=4 must be a multiple of train.micro_batch_size=3 x data size 1"),
    ),
    (
        "parallel.data=3",
        ("train.global_batch_size=4 must be a multiple of train.micro_batch_size=2 x data size 3"),
    ),
    # settings that exclude each other
    ("parallel.zero=2 parallel.pipeline=2", "parallel.zero=2 requires parallel.pipeline=1, not 2"),
    ("parallel.sequence=true", "parallel.sequence=true requires parallel.tensor of at least 2"),
    ("train.dtype=fp16", "train.dtype=fp16 requires a GPU; use bf16 or fp32 on CPUs"),
    ("data.valid=x data.split='9,1'", "data.split=9,1 cannot be used with data.valid"),
    # data
    (
        "data.train=null",
        ("data.train=null must be set; give the prefix that `megatrain preprocess --output` wrote"),
    ),
    (
        "data.train=nowhere",
        "there is no file nowhere.idx; a dataset is named without .bin and .idx",
    ),
    ('data.train=[{"path":"x"}]', "data.train={'path': 'x'} must have a path and a weight"),
    ("eval.every=5", "data.valid=null names no data; set it, or use a part of data.train"),
    ("data.tokenizer=nowhere", "data.tokenizer=nowhere does not exist"),
    ("data.train=", "data.train=null must be set"),
    (
        "data.train=/",
        "`/` is not the prefix of a dataset; give the path of its files without .bin and .idx",
    ),
    ('data.train=[{"path":"x","weight":-1}]', "data weight=-1 must be a number above 0"),
    (
        "data.split='0,1'",
        "data.split=0,1 gives none of the 40 documents to train; make its share larger",
    ),
    (
        "data.split='1,0' eval.every=2",
        "data.split=1,0 gives none of the 40 documents to valid; make its share larger",
    ),
    (
        "data.split='39,1' eval.every=2 data.sequence_length=32",
        "{folder}/data.bin, documents 39 to 39, has 20 tokens, but one sample takes",
    ),
    ("model=" + "a" * 300, "a" * 300 + ": File name too long"),
    ("parallel.schedule=zb", "parallel.schedule=zb is not a schedule; did you mean zb-v?"),
    ("train.init_from=nowhere", "train.init_from=nowhere does not exist"),
    # huge numbers
    ("parallel.pipeline=1e9", "parallel.pipeline=1000000000 must be at most num_hidden_layers=4"),
    (
        "parallel.pipeline=2 parallel.schedule=interleaved parallel.virtual=1e9",
        "parallel.pipeline=2 with 1000000000 virtual stages per rank gives 2000000000 stages",
    ),
    (
        "model.num_hidden_layers=1000000000",
        "model.num_hidden_layers=1000000000 must be at most 100,000",
    ),
    (
        "train.micro_batch_size=1 train.global_batch_size=1e9",
        (
            "train.global_batch_size=1000000000 makes 1,000,000,000 microbatches per replica and "
            "step"
        ),
    ),
    ("train.steps=1e30", "train.steps=1e+30 must be at most 9223372036854775807"),
    ("parallel.tensor=-2", "parallel.tensor=-2 must be at least 1"),
    ("data.sequence_length=0", "data.sequence_length=0 must be at least 1"),
    (
        "checkpoint.resume=nowhere",
        ("checkpoint.resume=nowhere is not a folder; use a checkpoint's folder, `auto` or `never`"),
    ),
]


@pytest.mark.parametrize(("overrides", "message"), MESSAGES)
def test_invalid_setting(refusal, tmp_path, overrides, message):
    assert refusal(*overrides.split()).startswith(message.replace("{folder}", str(tmp_path)))


def test_indivisible_vocabulary_is_padded(refusal):
    with pytest.raises(RankStarted):
        refusal("parallel.tensor=4")


DAMAGE = {
    "no .bin": (
        "data.bin",
        lambda file: file.unlink(),
        "there is no file {file}; a dataset is named without .bin and .idx",
    ),
    "no .idx": (
        "data.idx",
        lambda file: file.unlink(),
        "there is no file {file}; a dataset is named without .bin and .idx",
    ),
    "truncated .bin": (
        "data.bin",
        lambda file: file.write_bytes(file.read_bytes()[:800]),
        "{file} is 800 bytes long, but {folder}/data.idx describes 1600 bytes; one of "
        "them is damaged or belongs to another dataset",
    ),
    "odd size of .bin": (
        "data.bin",
        lambda file: file.write_bytes(file.read_bytes()[:801]),
        "{file} is 801 bytes long, but",
    ),
    "truncated .idx": (
        "data.idx",
        lambda file: file.write_bytes(file.read_bytes()[:200]),
        "{file} is 200 bytes long, but 40 sequences and 41 document indices take 842",
    ),
    "truncated header": (
        "data.idx",
        lambda file: file.write_bytes(b"MMIDIDX"),
        "{file} is 7 bytes long, shorter than the header of 34 bytes",
    ),
    "empty .idx": (
        "data.idx",
        lambda file: file.write_bytes(b""),
        "{file} is 0 bytes long, shorter than the header of 34 bytes",
    ),
    "bad magic": (
        "data.idx",
        lambda file: file.write_bytes(b"TNTIDX\0\0\0" + file.read_bytes()[9:]),
        "{file} is not a Megatron index: it starts with",
    ),
    "other version": (
        "data.idx",
        lambda file: file.write_bytes(
            file.read_bytes()[:9] + struct.pack("<Q", 2) + file.read_bytes()[17:]
        ),
        "{file}: version 2 of the index is not supported (supported: 1)",
    ),
    "no documents": (
        "data.idx",
        lambda file: file.write_bytes(file.read_bytes()[:18] + struct.pack("<QQq", 0, 1, 0)),
        "{file} contains no documents",
    ),
    "folder in place of .bin": (
        "data.bin",
        lambda file: (file.unlink(), file.mkdir()),
        "there is no file {file}",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data(refusal, tmp_path, name):
    file, damage, message = DAMAGE[name]
    damage(tmp_path / file)
    assert refusal().startswith(message.format(file=tmp_path / file, folder=tmp_path))


def test_data_without_tokens(refusal, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"")
    index = struct.pack("<9sQBQQiqqq", b"MMIDIDX\0\0", 1, 8, 1, 2, 0, 0, 0, 1)
    (tmp_path / "data.idx").write_bytes(index)
    assert refusal() == f"{tmp_path}/data.bin contains no tokens"


def test_data_shorter_than_a_sample(refusal, tmp_path):
    write_data(tmp_path / "short", tokens=LENGTH)
    assert refusal(f"data.train={tmp_path}/short") == (
        f"{tmp_path}/short.bin has 16 tokens, but one sample takes "
        "data.sequence_length=16 tokens and 1 for the last label"
    )


def test_tokenizer_larger_than_the_vocabulary(refusal, tmp_path):
    from megatrain.data.tokenizer import train_tokenizer

    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "some words to learn from"}) + "\n")
    train_tokenizer([tmp_path / "text.jsonl"], vocab_size=260, output=tmp_path / "tokenizer")
    message = refusal(f"data.tokenizer={tmp_path}/tokenizer")
    assert message.startswith("model.vocab_size=67 is less than the 26")
    assert f"tokens of data.tokenizer={tmp_path}/tokenizer; set model.vocab_size=26" in message
    assert refusal("--dry-run", f"data.tokenizer={tmp_path}/tokenizer") == message
    (tmp_path / "empty").mkdir()
    unreadable = refusal(f"data.tokenizer={tmp_path}/empty")
    assert unreadable.startswith(f"data.tokenizer={tmp_path}/empty cannot be loaded: ")
    assert "tokenizer.json" in unreadable


def test_dry_run_refuses_an_invalid_resume(refusal):
    assert refusal("--dry-run", "checkpoint.resume=nowhere").startswith(
        "checkpoint.resume=nowhere is not a folder"
    )


def test_output_folder_that_cannot_be_created(refusal, tmp_path):
    (tmp_path / "file").touch()
    message = refusal(f"run.output_dir={tmp_path}/file/run")
    assert message == f"run.output_dir={tmp_path}/file/run cannot be written (Not a directory)"


@pytest.mark.parametrize(
    "name", ["checkpoints", "logs", "config.yaml", "metrics.jsonl", "events.jsonl"]
)
def test_output_folder_with_an_unwritable_part(refusal, tmp_path, name):
    (tmp_path / "run").mkdir()
    if "." in name:
        (tmp_path / "run" / name).mkdir()
    else:
        (tmp_path / "run" / name).touch()
    reason = "Is a directory" if "." in name else "Not a directory"
    assert (
        refusal()
        == f"run.output_dir={tmp_path}/run contains {name}, which cannot be written ({reason})"
    )


def test_layout_does_not_fit_the_ranks_of_a_launcher(run_file):
    with pytest.raises(
        ConfigError,
        match="tensor 2 x pipeline 2 does not divide the 6 ranks of this run; start a multiple "
        "of 4 ranks",
    ):
        check_start(
            load(run_file, ["parallel.tensor=2", "parallel.pipeline=2"]), PretrainingTask(), 6
        )
    with pytest.raises(ConfigError, match="x data 2 requires 2 ranks, not 4; start 2 ranks"):
        check_start(load(run_file, ["parallel.data=2"]), PretrainingTask(), 4)
