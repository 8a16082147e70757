"""Errors that only a running rank can find: tokens outside the vocabulary, non-finite steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from helpers.readme_commands import run as run_command
from helpers.small_run import CONFIG, VOCABULARY, write_data

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
    """The exit code, messages and folder of a run that has ended."""

    def __init__(self, ended, folder):
        self.code, self.err, self.folder = ended.code, ended.err, folder

    def metrics(self):
        return [
            json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()
        ]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Runs each of RUNS; returns the ended runs by name."""
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


def test_token_outside_the_vocabulary_stops_the_run_at_its_batch(ended):
    run = ended["outside"]
    assert run.code == 1
    assert run.err == (
        f"error: {run.folder.parent}/outside.bin: document 25 contains token id 67, "
        "outside the vocabulary of 67; the file was written with another tokenizer\n"
    )
    assert len(run.metrics()) > 0, "steps before that batch were taken"


BAD_LOSS = "non-finite loss; the first layer with a non-finite output is block 0"
BAD_GRADIENT = (
    "non-finite gradient; the outputs of all layers are finite; in the order of the backward, "
    "the first non-finite gradient is that of model.layers.3.mlp.down_proj.weight"
)


@pytest.mark.parametrize(
    ("name", "bad_steps", "reason"),
    [
        ("loss", 3, BAD_LOSS),
        ("loss on stages", 2, BAD_LOSS),
        ("gradient", 2, BAD_GRADIENT),
        ("gradient of shards", 2, BAD_GRADIENT),
    ],
)
def test_nonfinite_steps_are_skipped_until_the_limit(ended, name, bad_steps, reason):
    """The update of the first step makes weights overflow; later steps update no weights."""
    run = ended[name]
    assert run.code == 1
    lines = [line for line in run.err.splitlines() if not line.startswith("warning: step ")]
    assert lines == [
        f"error: {bad_steps} steps in a row (stability.max_nonfinite_steps) had a {reason}"
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
