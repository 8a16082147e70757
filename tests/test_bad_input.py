"""What users get wrong is one sentence and an exit code, before any rank starts where that can be."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
import yaml
from helpers.readme_commands import run as run_command

from megatrain.__main__ import main
from megatrain.config.loader import load
from megatrain.data.indexed_dataset import IndexedWriter
from megatrain.errors import ConfigError
from megatrain.training.preflight import check_start
from megatrain.training.task import PretrainingTask

VOCABULARY, LENGTH = 67, 16
CONFIG = {
    "model": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "data": {"sequence_length": LENGTH},
    "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2},
}


def write_data(prefix, *, tokens=800, vocabulary=VOCABULARY):
    with IndexedWriter(prefix, vocab_size=vocabulary) as writer:
        for part in (
            np.random.default_rng(0)
            .integers(0, vocabulary, tokens)
            .reshape(-1, 20 if tokens > 20 else tokens)
        ):
            writer.add(part)


@pytest.fixture
def run_file(tmp_path):
    """A run that works."""
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
    """The one line that the command says to a config with these settings."""

    def start(*args, **more):
        raise RankStarted

    monkeypatch.setattr("megatrain.cli.train.run_local", start)
    for name in (
        "DS_ACCELERATOR",
        "OMP_NUM_THREADS",
    ):  # so that what the command sets there is taken back
        monkeypatch.setenv(name, os.environ.get(name, "cpu" if name == "DS_ACCELERATOR" else "1"))

    def refuse(*words):
        assert main(["pretrain", str(run_file), *words]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return refuse


def test_what_is_right_is_not_refused(refusal):
    with pytest.raises(RankStarted):
        refusal()


SENTENCES = {
    "train.stepz=5": "train.stepz=5 is not a setting; did you mean `steps`?",
    "trian.steps=5": "trian={'steps': 5} is not a section of the config; did you mean `train`?",
    "train.steps=many": "train.steps=many must be a whole number or null, not text",
    "train.tokens=.inf": "train.tokens=inf must be a whole number or null; it is a number",
    "optimizer.lr=.nan": "optimizer.lr=nan must be a finite number",
    "model.num_layers=4": "model.num_layers=4 is not a field of a llama config; did you mean",
    "model.num_hidden_layers=four": "model=(llama fields) is refused by transformers: Validation error for field 'num_hidden_layers'",
    "model.model_type=bert": "model.model_type=bert is not supported (supported: gpt2, ",
    "model=nowhere": "model=nowhere does not exist; give a folder, a config.json, or fields with model_type",
    "model.hidden_act=relu2": "model.hidden_act=relu2 is not supported (supported: silu, ",
    # a layout that does not fit the model
    "parallel.tensor=3": "parallel.tensor=3 must divide num_attention_heads=4 and intermediate_size=48, and must divide num_key_value_heads=2",
    "parallel.tensor=8": "parallel.tensor=8 must divide num_attention_heads=4",
    "model.num_key_value_heads=3": "model.num_key_value_heads=3 must divide num_attention_heads=4",
    "parallel.pipeline=5": "parallel.pipeline=5 must be at most num_hidden_layers=4",
    "data.sequence_length=65": "data.sequence_length=65 is more than the model's 64 positions; use at most 64",
    # a batch that does not divide
    "train.micro_batch_size=3": "train.global_batch_size=4 must be a multiple of train.micro_batch_size=3 x data size 1",
    "parallel.data=3": "train.global_batch_size=4 must be a multiple of train.micro_batch_size=2 x data size 3; ",
    # what does not go together
    "parallel.zero=2 parallel.pipeline=2": "parallel.zero=2 requires parallel.pipeline=1, not 2",
    "parallel.sequence=true": "parallel.sequence=true requires parallel.tensor of at least 2",
    "train.dtype=fp16": "train.dtype=fp16 requires a GPU; use bf16 or fp32 on CPUs",
    "data.valid=x data.split='9,1'": "data.split=9,1 cannot be used with data.valid",
    # data
    "data.train=null": "data.train=null must be set; give the prefix that `megatrain preprocess --output` wrote",
    "data.train=nowhere": "there is no file nowhere.idx; a dataset is named without .bin and .idx",
    'data.train=[{"path":"x"}]': "data.train={'path': 'x'} must have a path and a weight",
    "eval.every=5": "data.valid=null names no data; set it, or use a part of data.train",
    "data.tokenizer=nowhere": "data.tokenizer=nowhere does not exist",
    "data.train=": "data.train=null must be set",
    "data.train=/": "`/` is not the prefix of a dataset; give the path of its files without .bin and .idx",
    'data.train=[{"path":"x","weight":-1}]': "data weight=-1 must be a number above 0",
    "data.split='0,1'": "data.split=0,1 gives none of the 40 documents to train; make its share larger",
    "data.split='1,0' eval.every=2": "data.split=1,0 gives none of the 40 documents to valid; make its share larger",
    "data.split='39,1' eval.every=2 data.sequence_length=32": "{folder}/data.bin, documents 39 to 39, has 20 tokens, but one sample takes",
    "model=" + "a" * 300: "a" * 300 + ": File name too long",
    "parallel.schedule=zb": "parallel.schedule=zb is not a schedule; did you mean zb-v?",
    "train.init_from=nowhere": "train.init_from=nowhere does not exist",
    # numbers beyond all measure
    "parallel.pipeline=1e9": "parallel.pipeline=1000000000 must be at most num_hidden_layers=4",
    "parallel.pipeline=2 parallel.schedule=interleaved parallel.virtual=1e9": "parallel.pipeline=2 with 1000000000 virtual stages per rank gives 2000000000 stages",
    "model.num_hidden_layers=1000000000": "model.num_hidden_layers=1000000000 is more than 100,000",
    "train.micro_batch_size=1 train.global_batch_size=1e9": "train.global_batch_size=1000000000 makes 1,000,000,000 microbatches of each replica in a step",
    "train.steps=1e30": "train.steps=1e+30 is beyond 9.2e+18",
    "parallel.tensor=-2": "parallel.tensor=-2 must be at least 1",
    "data.sequence_length=0": "data.sequence_length=0 must be at least 1",
    "checkpoint.resume=nowhere": "checkpoint.resume=nowhere is not a folder; use a checkpoint's folder, `auto` or `never`",
}


@pytest.mark.parametrize("words", SENTENCES)
def test_a_setting_that_cannot_work(refusal, tmp_path, words):
    assert refusal(*words.split()).startswith(SENTENCES[words].replace("{folder}", str(tmp_path)))


def test_a_vocabulary_that_does_not_divide_is_padded(refusal):
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
    "half a .bin": (
        "data.bin",
        lambda file: file.write_bytes(file.read_bytes()[:800]),
        "{file} is 800 bytes long, but {folder}/data.idx describes 1600 bytes; one of them is damaged or of another run",
    ),
    "an odd .bin": (
        "data.bin",
        lambda file: file.write_bytes(file.read_bytes()[:801]),
        "{file} is 801 bytes long, but",
    ),
    "half an .idx": (
        "data.idx",
        lambda file: file.write_bytes(file.read_bytes()[:200]),
        "{file} is 200 bytes long, but its header",
    ),
    "a stump of an .idx": (
        "data.idx",
        lambda file: file.write_bytes(b"MMIDIDX"),
        "{file} is 7 bytes long, shorter than the header of 34 bytes",
    ),
    "an empty .idx": (
        "data.idx",
        lambda file: file.write_bytes(b""),
        "{file} is 0 bytes long, shorter than the header of 34 bytes",
    ),
    "bad magic": (
        "data.idx",
        lambda file: file.write_bytes(b"TNTIDX\0\0\0" + file.read_bytes()[9:]),
        "{file} is not a Megatron index: it starts with",
    ),
    "another version": (
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
    "a folder for a .bin": (
        "data.bin",
        lambda file: (file.unlink(), file.mkdir()),
        "there is no file {file}",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data(refusal, tmp_path, name):
    file, damage, sentence = DAMAGE[name]
    damage(tmp_path / file)
    assert refusal().startswith(sentence.format(file=tmp_path / file, folder=tmp_path))


def test_data_without_tokens(refusal, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"")
    index = struct.pack("<9sQBQQiqqq", b"MMIDIDX\0\0", 1, 8, 1, 2, 0, 0, 0, 1)
    (tmp_path / "data.idx").write_bytes(index)
    assert refusal() == f"{tmp_path}/data.bin contains no tokens"


def test_data_of_less_than_a_sample(refusal, tmp_path):
    write_data(tmp_path / "short", tokens=LENGTH)
    assert refusal(f"data.train={tmp_path}/short") == (
        f"{tmp_path}/short.bin has 16 tokens, but one sample takes data.sequence_length=16 tokens and 1 for the last label"
    )


def test_a_tokenizer_larger_than_the_models_vocabulary(refusal, tmp_path):
    from megatrain.data.tokenizer import train_tokenizer

    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "some words to learn from"}) + "\n")
    train_tokenizer([tmp_path / "text.jsonl"], vocab_size=260, output=tmp_path / "tokenizer")
    said = refusal(f"data.tokenizer={tmp_path}/tokenizer")
    assert said.startswith("model.vocab_size=67 is less than the 26")
    assert f"tokens of data.tokenizer={tmp_path}/tokenizer; set model.vocab_size=26" in said
    assert refusal("--dry-run", f"data.tokenizer={tmp_path}/tokenizer") == said
    (tmp_path / "empty").mkdir()
    unreadable = refusal(f"data.tokenizer={tmp_path}/empty")
    assert unreadable.startswith(f"data.tokenizer={tmp_path}/empty cannot be loaded: ")
    assert "tokenizer.json" in unreadable


def test_a_checkpoint_that_cannot_be_resumed_is_refused_by_a_dry_run_too(refusal):
    assert refusal("--dry-run", "checkpoint.resume=nowhere").startswith(
        "checkpoint.resume=nowhere is not a folder"
    )


def test_an_output_folder_that_cannot_be_made(refusal, tmp_path):
    (tmp_path / "file").touch()
    said = refusal(f"run.output_dir={tmp_path}/file/run")
    assert said == f"run.output_dir={tmp_path}/file/run cannot be written (Not a directory)"


@pytest.mark.parametrize(
    "name", ["checkpoints", "logs", "config.yaml", "metrics.jsonl", "events.jsonl"]
)
def test_an_output_folder_of_which_a_part_cannot_be_written(refusal, tmp_path, name):
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


def test_a_layout_that_does_not_fit_a_launchers_ranks(run_file):
    """The first thing that rank 0 does; the others then say the same."""
    with pytest.raises(
        ConfigError,
        match="tensor 2 x pipeline 2 does not divide the 6 ranks of this run; start a multiple of 4 ranks",
    ):
        check_start(
            load(run_file, ["parallel.tensor=2", "parallel.pipeline=2"]), PretrainingTask(), 6
        )
    with pytest.raises(
        ConfigError, match="x data 2 needs 2 ranks and there are 4; start 2 ranks or leave"
    ):
        check_start(load(run_file, ["parallel.data=2"]), PretrainingTask(), 4)


# ---------------------------------------------------------------------------------------------------------------------
# what only a running rank can see

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OVERFLOWING = {"optimizer": {"lr": 1e30, "grad_clip": 0.0}}
RUNS = {
    "outside": {"parallel": {"pipeline": 2}},
    "loss": {
        "model": GPT2,
        **OVERFLOWING,
        "stability": {"max_nonfinite_steps": 3},
    },
    "loss on stages": {
        "model": GPT2,
        **OVERFLOWING,
        "stability": {"max_nonfinite_steps": 2},
        "parallel": {"pipeline": 2},
    },
    "gradient": {
        **OVERFLOWING,
        "stability": {"max_nonfinite_steps": 2},
    },
    "gradient of shards": {
        **OVERFLOWING,
        "stability": {"max_nonfinite_steps": 2},
        "parallel": {"data": 2, "zero": 3},
    },
}


class Ended:
    """A run that has ended."""

    def __init__(self, ended, folder):
        self.code, self.err, self.folder = ended.code, ended.err, folder

    def metrics(self):
        return [
            json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()
        ]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Each run of RUNS, by name."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder / "data")
    write_data(folder / "outside")
    tokens = np.memmap(folder / "outside.bin", dtype=np.uint16, mode="r+")
    tokens[500] = VOCABULARY
    tokens.flush()
    found = {}
    for name, settings in RUNS.items():
        data = {
            **CONFIG["data"],
            "train": str(folder / ("outside" if name == "outside" else "data")),
        }
        output = folder / name.replace(" ", "-")
        (folder / "run.yaml").write_text(
            yaml.safe_dump({**CONFIG, "run": {"output_dir": str(output)}, "data": data, **settings})
        )
        found[name] = Ended(run_command("pretrain", folder / "run.yaml", folder=folder), output)
    return found


def test_a_token_outside_the_vocabulary_ends_the_run_at_the_batch_that_has_it(ended):
    run = ended["outside"]
    assert run.code == 1
    assert run.err == (
        f"error: {run.folder.parent}/outside.bin: document 25 contains token id 67, outside the vocabulary of 67; "
        "it was written with another tokenizer\n"
    )
    assert len(run.metrics()) > 0, "steps before that batch were taken"


@pytest.mark.parametrize(
    ("name", "bad_steps", "sentence"),
    [
        ("loss", 3, "non-finite loss; the first layer with a non-finite output is block 0"),
        (
            "loss on stages",
            2,
            "non-finite loss; the first layer with a non-finite output is block 0",
        ),
        (
            "gradient",
            2,
            "non-finite gradient; all layers' outputs are finite, and the first gradient behind the loss that is not is that of "
            "model.layers.3.mlp.down_proj.weight",
        ),
        (
            "gradient of shards",
            2,
            "non-finite gradient; all layers' outputs are finite, and the first gradient behind the loss that is not is "
            "that of model.layers.3.mlp.down_proj.weight",
        ),
    ],
)
def test_bad_numbers_are_skipped_and_after_some_in_a_row_the_run_stops(
    ended, name, bad_steps, sentence
):
    """The first step's update makes weights that overflow; nothing is updated after it."""
    run = ended[name]
    assert run.code == 1
    lines = [line for line in run.err.splitlines() if not line.startswith("warning: step ")]
    assert lines == [
        f"error: {bad_steps} steps in a row (stability.max_nonfinite_steps) had a {sentence}"
    ]
    metrics = run.metrics()
    assert [step["skipped"] for step in metrics] == [False] + [True] * bad_steps
    losses = [step["loss"] for step in metrics[1:]]
    assert (
        all(loss is None for loss in losses)
        if name.startswith("loss")
        else all(abs(loss - np.log(VOCABULARY)) < 0.1 for loss in losses)
    )
    assert all(step["grad_norm"] is None for step in metrics[1:])
