"""The same run under other people's launchers: same losses, saved in one place, the console said once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatrain import config
from megatrain.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "megatrain" / "pretrain.py")
BIN = Path(sys.executable).parent

FIGURES = {"step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "tflops_per_rank", "mfu"}
"""What every line of metrics.jsonl has at least."""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    with IndexedWriter(folder / "tokens", vocab_size=67) as writer:
        for document in np.random.default_rng(0).integers(0, 67, (40, 30)):
            writer.add(document)
    model = {"model_type": "llama", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    raw = {"model": model, "parallel": {"pipeline": 2}, "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 1},
           "data": {"train": str(folder / "tokens"), "sequence_length": 16}}  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def launch(run_file, name, command):
    output = run_file.parent / name
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")}
    done = subprocess.run([*command, str(run_file), f"run.output_dir={output}"], cwd=ROOT, capture_output=True, text=True, timeout=240,
                          check=False, env={**environment, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything is in") == 1
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000003"]
    assert {path.name for path in output.iterdir()} >= {"config.yaml", "metrics.jsonl", "events.jsonl", "tensorboard", "checkpoints", "loss.png", "logs"}
    assert config.load(output / "config.yaml") == config.load(run_file, [f"run.output_dir={output}"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line.keys() >= FIGURES for line in lines)
    return [line["loss"] for line in lines]


def test_launchers_give_the_run_that_the_verb_gives(run_file, capsys, monkeypatch):
    alone = launch(run_file, "verb", [sys.executable, "-m", "megatrain", "pretrain"])
    monkeypatch.syspath_prepend(ROOT / "tools")
    from try_model import main as try_model

    assert [try_model([str(run_file.parent / name)]) for name in ("nowhere", "verb")] == [1, 1]
    none, not_evaluated = capsys.readouterr().err.splitlines()
    assert none == f"error: CONFIG={run_file.parent}/nowhere/config.yaml does not exist"
    assert not_evaluated == f"error: {run_file.parent}/verb/metrics.jsonl has no validation loss of step 3, that of the newest checkpoint"
    port = free_port()
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port, SCRIPT]
    assert launch(run_file, "torchrun", torchrun) == alone
    deepspeed = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port(), SCRIPT]
    assert launch(run_file, "deepspeed", deepspeed) == alone
