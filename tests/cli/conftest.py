"""A valid run, and the `check` command in this process."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import yaml

from megatrain.__main__ import main
from megatrain.data.indexed_dataset import IndexedWriter

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
    """A valid run in the working directory."""
    for name in (
        "DS_ACCELERATOR",
        "OMP_NUM_THREADS",
    ):  # restored after the command sets them
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


class CheckResult:
    """Exit code and output of the command, and its errors with their fixes."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        self.errors = dict(re.findall(r"^error: (.*)\n(?:  fix: (.*)\n)?", err, re.MULTILINE))
        self.warnings = re.findall(r"^warning: (.*)", err, re.MULTILINE)


@pytest.fixture
def check(capfd):
    def run(file, *words):
        code = main(["check", str(file), *words])
        return CheckResult(code, *capfd.readouterr())

    return run
