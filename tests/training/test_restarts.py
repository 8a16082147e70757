"""A run whose ranks are killed restarts, and ends as an undisturbed one."""

import contextlib
import os
import shutil
import signal
import time

import pytest
import yaml
from helpers import readme_commands
from helpers.training_runs import write_tokens

from megatrain import files
from megatrain.telemetry import events

MODEL = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STEPS = 60
FIRST, LAST = "checkpoints/step-00000005", f"checkpoints/step-{STEPS:08d}"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_tokens(folder / "tokens")
    train = {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1}
    raw = {
        "model": MODEL,
        "parallel": {"pipeline": 2},
        "data": {"train": str(folder / "tokens"), "sequence_length": 16},
        "train": train,
        "checkpoint": {"save_every": 5},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


def ranks_of_last_start(output):
    """Returns the last process of each rank, by its log."""
    logs = [files.read(output / f"logs/rank-{rank:05d}.jsonl") for rank in (0, 1)]
    return [[line["process"] for line in lines if line["message"] == "start"][-1] for lines in logs]


@pytest.fixture(scope="module")
def undisturbed(run_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert (
        readme_commands.run(
            "pretrain", run_file, f"run.output_dir={folder / 'run'}", folder=folder
        ).code
        == 0
    )
    return folder / "run"


def killed_once(run_file, output, *words):
    """Kills rank 1 after the first checkpoint; returns the output, None if the run was too fast."""
    command = readme_commands.start(
        "pretrain",
        run_file,
        f"run.output_dir={output}",
        "run.max_restarts=3",
        *words,
        folder=output.parent,
    )
    end = time.monotonic() + 300
    while not (output / FIRST).exists() and not command.has_ended():
        assert time.monotonic() < end
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks_of_last_start(output)[1], signal.SIGKILL)
    ended = command.wait()
    assert ended.code == 0, ended
    return ended.err or None


def weights(output):
    return {path.name: path.read_bytes() for path in (output / LAST).rglob("*.safetensors")}


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_killed_ranks_restart_without_loss(resume, run_file, undisturbed, tmp_path):
    for trial in range(10):
        output = tmp_path / f"run-{trial}"
        if resume == "never":  # a checkpoint of an earlier run is ignored
            shutil.copytree(undisturbed / LAST, output / LAST)
        if words := killed_once(run_file, output, f"checkpoint.resume={resume}"):
            break
    assert words.startswith("rank 1 was killed by signal SIGKILL")
    assert "restart 1 of 3 (run.max_restarts) after a failure in step " in words
    assert weights(output) == weights(undisturbed)
    story = [event for event in events.read(output) if event.event in ("restart", "resume")]
    assert [event.event for event in story] == ["restart", "resume"]
    assert (story[0].fields["restart"], story[0].fields["cause"]) == (
        1,
        "rank 1 was killed by signal SIGKILL (often: out of memory)",
    )
    assert 5 <= story[1].step <= story[0].step < STEPS
    assert [line["step"] for line in files.read(output / "metrics.jsonl")] == list(
        range(1, STEPS + 1)
    )
