"""Memory and disk space in `megatrain check`."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from helpers.readme_commands import run as run_command

from megatrain.config import loader as configuration
from megatrain.models.config import load_hf_config, read_config
from megatrain.planner.memory import predict
from megatrain.planner.run_spec import Cluster, RunSpec


def test_too_small_gpu(check, run_file):
    """The fix makes the run fit. A GPU's name stands for its memory."""
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
    result = check(run_file, *large, "0.1")
    ((text, fix),) = result.errors.items()
    assert text.startswith("the heaviest rank takes 0.")
    assert check(run_file, *large, "0.1", *fix.split()).code == 0
    assert "of a GPU's 141 on" in check(run_file, "--gpu-memory", "h200").out


def heaviest(result):
    return float(re.search(r"heaviest: ([\d.]+) GiB", result.out)[1])


def test_gpu_too_small_for_any_change(check, run_file):
    """The message lists the tried changes and the missing memory."""
    words = ["model.hidden_size=512", "model.intermediate_size=2048", "--gpus-per-node", "2"]
    ((text, fix),) = check(run_file, *words, "--gpu-memory", "0.01GiB").errors.items()
    best, least, lacks, tried = re.search(
        r"fits: (.+) takes least, ([\d.]+) GiB, which is ([\d.]+) too much "
        r"\(tried: (.*)\); use larger GPUs",
        text,
    ).groups()
    assert fix == ""
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


def test_nearly_full_gpu_and_more_machines(check, run_file):
    """A change that leaves no room is a warning; more machines are tried last."""
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
    ((text, fix),) = check(
        run_file,
        *words,
        "2",
        "parallel.pipeline=1",
        "parallel.data=2",
        "--gpu-memory",
        f"{two / 0.96}",
    ).errors.items()
    assert fix.split()[0] in ("parallel.tensor=2", "parallel.pipeline=2")
    assert re.search(
        r"9\d% of a GPU, but driver, .* need memory too \(tried: .*parallel.pipeline=2", text
    )
    result = check(run_file, *words, "2", *fix.split(), "--gpu-memory", f"{two / 0.96}")
    assert (result.code, len(result.warnings)) == (0, 1)
    assert four < two < alone
    ((text, fix),) = check(run_file, *words, "1", "--gpu-memory", f"{two * 0.99}").errors.items()
    assert fix == "parallel.pipeline=4 --nodes 4 --gpus-per-node 1"
    assert (
        check(run_file, *words, "1", "--gpu-memory", f"{two * 0.99}", *fix.split()).warnings == []
    )


def test_too_small_disk(check, run_file, monkeypatch):
    free = 14 * 39_584 * 5 // 2  # 14 bytes a parameter in bf16: two checkpoints and a half
    monkeypatch.setattr(
        "megatrain.planner.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=free)
    )
    words = ["train.dtype=bf16", "checkpoint.save_every=2", "checkpoint.keep_last=3"]
    ((text, fix),) = check(run_file, *words).errors.items()
    assert "and 4 checkpoints of " in text
    assert fix == "checkpoint.keep_last=1"
    assert check(run_file, *words, fix).code == 0


def test_epochs_without_known_steps(check, run_file):
    """The number of checkpoints is unknown unless retention limits it."""
    words = ["--verb", "finetune", "train.steps=null", "train.epochs=2", "checkpoint.save_every=5"]
    result = check(run_file, *words)
    assert "  work    2 epochs, in steps of 64 tokens" in result.out
    assert (
        "one every 5 steps, and the number of steps depends on the data; "
        "checkpoint.keep_last=0 keeps all" in result.out
    )
    assert len(result.warnings) == 1
    assert result.warnings[0].endswith("; checkpoint.keep_last=3 keeps the newest three")
    result = check(run_file, *words, "checkpoint.keep_last=3")
    assert result.warnings == []
    assert "each, 4 at once;" in result.out
    assert "each, one;" in check(run_file, *words, "checkpoint.save_every=0").out


def test_predicted_sizes_of_a_real_run(tmp_path, run_file, check):
    """The checkpoint's size matches, and the metrics contain the predicted memory."""

    result = check(run_file)
    ended = run_command(
        "pretrain", run_file, "train.steps=1", f"run.output_dir={tmp_path / 'run'}", folder=tmp_path
    )
    assert ended.code == 0, ended.err
    real = sum(
        path.stat().st_size
        for path in (tmp_path / "run/checkpoints/step-00000001").rglob("*.safetensors")
    )
    told = float(re.search(r"checkpoints: ([\d.]+) kB each", result.out)[1]) * 1e3
    assert told == pytest.approx(real, rel=0.05)
    (line,) = (
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    )
    config = configuration.load(run_file)
    model = read_config(load_hf_config(config.model))
    (memory,) = predict(RunSpec.create(config, model, Cluster(1, 1, "cpu")))
    assert line["memory_predicted_gib"] == memory.total / 2**30
    assert line["memory_gib"] is None or line["memory_gib"] > 0
