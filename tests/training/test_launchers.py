"""Launchers start the same run: equal losses, one folder, and console lines once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import readme_commands
from helpers.checkout_paths import PACKAGE, ROOT, TOOLS
from helpers.free_ports import reserved_port
from helpers.training_runs import write_tokens

from megatrain.config import loader

BIN = Path(sys.executable).parent

FIGURES = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "seconds",
    "tokens_per_second",
    "tflops_per_rank",
    "mfu",
}
"""What every line of metrics.jsonl has at least."""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    write_tokens(folder / "tokens")
    model = {
        "model_type": "llama",
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    raw = {
        "model": model,
        "parallel": {"pipeline": 2},
        "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 1},
        "data": {"train": str(folder / "tokens"), "sequence_length": 16},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


def launch(run_file, name, *command):
    """Starts a run with a launcher and returns `losses_of` it."""
    output = run_file.parent / name
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")
    }
    done = subprocess.run(
        [*command, PACKAGE / "pretrain.py", run_file, f"run.output_dir={output}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results are in") == 1
    return losses_of(run_file, name)


def losses_of(run_file, name):
    """Returns the losses of a run whose folder is complete."""
    output = run_file.parent / name
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000003"]
    assert {path.name for path in output.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "tensorboard",
        "checkpoints",
        "loss.png",
        "logs",
    }
    assert loader.load(output / "config.yaml") == loader.load(
        run_file, [f"run.output_dir={output}"]
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line.keys() >= FIGURES for line in lines)
    return [line["loss"] for line in lines]


def test_launchers_start_the_same_run_as_the_command(run_file, capsys, monkeypatch):
    ended = readme_commands.run(
        "pretrain",
        run_file,
        f"run.output_dir={run_file.parent / 'command'}",
        folder=run_file.parent,
    )
    assert ended.code == 0, ended
    assert ended.out.count("results are in") == 1
    alone = losses_of(run_file, "command")
    monkeypatch.syspath_prepend(TOOLS)
    from try_model import main as try_model

    assert [try_model([str(run_file.parent / name)]) for name in ("nowhere", "command")] == [1, 1]
    none, not_evaluated = capsys.readouterr().err.splitlines()
    assert none.startswith(f"error: CONFIG={run_file.parent}/nowhere/config.yaml does not exist;")
    assert (
        not_evaluated
        == f"error: {run_file.parent}/command/metrics.jsonl has no validation loss of step 3, that "
        f"of the newest checkpoint"
    )
    with reserved_port() as port:
        assert (
            launch(
                run_file,
                "torchrun",
                BIN / "torchrun",
                "--nproc-per-node",
                "2",
                "--master-port",
                str(port),
            )
            == alone
        )
    with reserved_port() as port:
        assert (
            launch(
                run_file,
                "deepspeed",
                BIN / "deepspeed",
                "--num_accelerators",
                "2",
                "--master_port",
                str(port),
            )
            == alone
        )
