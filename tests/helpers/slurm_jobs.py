"""Runs submitted to the test cluster, and readers of their output."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from helpers import fault_marks
from helpers.netns_slurm import Cluster
from megatrain.checkpoint import manifest
from megatrain.data.indexed_dataset import IndexedWriter

ROOT = Path(__file__).parents[2]
TIMEOUT = 300
"""Seconds; on an idle machine everything takes about ten."""
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
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def write_run(
    folder: Path,
    *,
    train: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> Path:
    """Writes data and the YAML of a run on four ranks; the default is 2 stages x 2 replicas."""
    with IndexedWriter(folder / "tokens", vocab_size=67) as writer:
        for document in np.random.default_rng(0).integers(0, 67, (40, 30)):
            writer.add(document)
    raw = {
        "model": MODEL,
        "parallel": parallel or {"pipeline": 2, "data": 2},
        "data": {
            "train": str(folder / "tokens"),
            "valid": str(folder / "tokens"),
            "sequence_length": 16,
        },
        "train": {"global_batch_size": 4, "micro_batch_size": 1, **train},
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


class Job:
    """A submission of slurm/pretrain.sh on two nodes of two ranks; `python` starts the ranks."""

    def __init__(
        self,
        cluster: Cluster,
        run_file: Path,
        output: Path,
        *,
        python: Path | str = sys.executable,
        overrides: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
        log_folder: Path | None = None,
        **environment: str,
    ) -> None:
        self.cluster, self.output = cluster, output
        self.log_path = (log_folder or output.parent) / f"{output.name}.out"
        self.began = len(self._full_log())
        self.id = cluster.run(
            "sbatch",
            "--parsable",
            "-N2",
            "--ntasks-per-node=2",
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            f"--chdir={ROOT}",
            *options,
            f"--output={self.log_path}",
            "slurm/pretrain.sh",
            run_file,
            f"run.output_dir={output}",
            *overrides,
            cwd=ROOT,
            PYTHON=str(python),
            OMP_NUM_THREADS="1",
            PYTHONPATH=str(ROOT),
            **environment,
        )
        self.attempt = 0
        self.marks = Path(environment["MARKS"]) if "MARKS" in environment else None

    def requeue(self) -> None:
        """Requeues a job that has ended."""
        self.began = len(self._full_log())
        self.cluster.run("scontrol", "requeue", self.id)
        self.attempt += 1

    def _full_log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log(self) -> str:
        """Returns the job's log since it was last queued."""
        return self._full_log()[self.began :]

    @property
    def state(self) -> str:
        return self.cluster.state(self.id)

    def wait(self) -> str:
        return self.cluster.wait(self.id, timeout=TIMEOUT)

    def until(self, condition: Any, what: str) -> None:
        """Waits for the condition, which must hold before the job ends."""
        until, polls = time.monotonic() + TIMEOUT, 0
        while not condition():
            assert time.monotonic() < until, (
                f"not {what} after {TIMEOUT} s; the job's log:\n{self.log()[-4000:]}"
            )
            time.sleep(0.1)
            polls += 1
            if polls % 20 == 0:  # asking Slurm costs more than reading files
                assert self.state not in ENDED or condition(), (
                    f"ended before {what}:\n{self.log()[-4000:]}"
                )

    def until_beyond(self, step: int) -> None:
        self.until(lambda: last_step(self.output) > step, f"beyond step {step}")

    def mark(self, rank: int) -> fault_marks.State | None:
        """Returns the marks of a rank; the job must have a folder for them."""
        assert self.marks is not None
        return fault_marks.read(self.marks, self.id, self.attempt, rank)


def metrics(output: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of metrics.jsonl, without times."""
    path = output / "metrics.jsonl"
    lines = (
        [
            json.loads(line)
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        if path.exists()
        else []
    )
    return [
        {
            name: line[name]
            for name in ("step", "loss", "grad_norm", "lr", "tokens", "valid_loss")
            if name in line
        }
        for line in lines
    ]


def last_step(output: Path) -> int:
    return max((line["step"] for line in metrics(output)), default=0)


def complete_steps(output: Path) -> list[int]:
    """Returns the steps of the run's complete checkpoints; compares all hashes."""
    folders = (output / "checkpoints").glob("step-*")
    return sorted(
        int(folder.name[5:])
        for folder in folders
        if manifest.find_problem(folder, hashes=True) is None
    )


def content(output: Path, step: int) -> dict[str, str]:
    """Returns the hash of each tensor file of a checkpoint."""
    folder = output / f"checkpoints/step-{step:08d}"
    paths = sorted(folder.rglob("*.safetensors"))
    assert paths, f"nothing in {folder}"
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def rank_processes(output: Path) -> list[int]:
    """Returns the ids of a run's live processes: of each rank's log, the last that started."""
    found = []
    for log in sorted((output / "logs").glob("rank-*.log")):
        starts = [
            line for line in log.read_text(errors="replace").splitlines() if line.startswith("=== ")
        ]
        process = int(starts[-1].rpartition("process ")[2])
        if is_alive(process):
            found.append(process)
    return found


def is_alive(process: int) -> bool:
    """Returns True if a process runs, and False if it is gone or a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_same(output: Path, undisturbed: Path, steps: int) -> None:
    """Asserts that the run took each step once, with metrics and tensors of the undisturbed run."""
    assert metrics(output) == metrics(undisturbed)
    assert [line["step"] for line in metrics(output) if "loss" in line] == list(range(1, steps + 1))
    assert content(output, steps) == content(undisturbed, steps)
