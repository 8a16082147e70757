"""Whole runs on a real Slurm of two nodes: what a cluster does to a run leaves it as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from megatrain.data.indexed import IndexedWriter
from slurm import Cluster, Missing, find_programs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
STEPS = 80
TIMEOUT = 300
"""Seconds for what takes some ten on a quiet machine."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        programs = find_programs(Path(tempfile.gettempdir()) / f"megatrain-slurm-{os.getuid()}")
    except Missing as reason:
        pytest.skip(f"no Slurm cluster can be made here: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), programs=programs)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with IndexedWriter(folder / "tokens", vocab_size=67) as writer:
        for document in np.random.default_rng(0).integers(0, 67, (40, 30)):
            writer.add(document)
    model = {"model_type": "llama", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.1,
             "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    raw = {"model": model, "parallel": {"pipeline": 2, "data": 2}, "data": {"train": str(folder / "tokens"), "sequence_length": 16},
           "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "save_every": 10, "keep_last": 3}}  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


class Job:
    """One submission of slurm/pretrain.sh on two nodes of two ranks."""

    def __init__(self, cluster: Cluster, run_file: Path, output: Path) -> None:
        self.cluster, self.output = cluster, output
        self.log = output.with_suffix(".out")
        self.id = cluster.run(
            "sbatch", "--parsable", "-N2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--chdir={ROOT}",
            f"--output={self.log}", "slurm/pretrain.sh", run_file, f"run.output_dir={output}", cwd=ROOT,
            PYTHON=sys.executable, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT),
        )  # fmt: skip

    def until(self, condition, what):
        until = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < until, f"not {what} after {TIMEOUT} s; the job's log:\n{self.words()}"
            assert self.cluster.state(self.id) not in ("COMPLETED", "FAILED", "CANCELLED"), f"ended before {what}:\n{self.words()}"
            time.sleep(0.2)

    def words(self):
        return self.log.read_text()[-4000:] if self.log.exists() else "(nothing)"

    def steps(self):
        metrics = self.output / "metrics.jsonl"
        return json.loads(metrics.read_text().splitlines()[-1])["step"] if metrics.exists() and metrics.read_text() else 0

    def until_beyond(self, step):
        self.until(lambda: self.steps() > step, f"beyond step {step}")


def rank_pids(output):
    """Process ids of the ranks of a run that are alive, found by their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if entry.name.isdigit() and words[0].endswith(Path(sys.executable).name.encode()) and f"run.output_dir={output}".encode() in words:
            found.append(int(entry.name))
    return sorted(found)


def weights(output):
    paths = sorted((output / f"checkpoints/step-{STEPS:08d}").rglob("*.safetensors"))
    assert paths
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_run_through_preemption_a_killed_rank_and_a_lost_node_ends_as_an_undisturbed_one(cluster, run_file, tmp_path):
    output = tmp_path / "disturbed"
    job = Job(cluster, run_file, output)
    job.until_beyond(5)
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)  # as --signal does before the time is over
    job.until(lambda: "attempt 2" in job.words(), "queued again")
    stopped_at = job.steps()
    assert f"stopped by a signal after step {stopped_at}" in job.log.read_text()
    job.until_beyond(stopped_at + 5)
    assert f"step-{stopped_at:08d}, the newest whole checkpoint" in job.log.read_text()

    os.kill(rank_pids(output)[-1], signal.SIGKILL)
    assert cluster.wait(job.id, timeout=TIMEOUT) == "FAILED", job.words()
    assert rank_pids(output) == []

    job = Job(cluster, run_file, output)
    job.until_beyond(job.steps() + 3)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.until(lambda: cluster.state(job.id) == "PENDING", "back in the queue")
    cluster.run("scontrol", "update", "nodename=node2", "state=resume", check=False)  # where it has not come back by itself
    assert cluster.wait(job.id, timeout=TIMEOUT) == "COMPLETED", job.words()

    undisturbed = tmp_path / "undisturbed"
    command = [sys.executable, "-m", "megatrain", "pretrain", run_file, f"run.output_dir={undisturbed}", "train.save_every=0"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=TIMEOUT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert weights(output) == weights(undisturbed)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    there = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in there]


def test_a_mistake_in_the_config_ends_the_job_before_a_rank_starts(cluster, run_file, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(run_file.read_text().replace("micro_batch_size: 1", "micro_batch_size: 3"))
    job = Job(cluster, bad, tmp_path / "never")
    assert cluster.wait(job.id, timeout=TIMEOUT) == "FAILED"
    assert "error: train.global_batch_size=4 is not a multiple of train.micro_batch_size=3" in job.words()
    assert "rank" not in job.words()
