"""Runs submitted to the test cluster, and what they leave behind."""

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
"""Seconds for what takes some ten on a quiet machine."""
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
    """A run's YAML with data beside it, for four ranks: 2 stages x 2 replicas unless said."""
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
    """One submission of slurm/pretrain.sh on two nodes of two ranks; `python` is the program that its ranks are started with."""

    def __init__(
        self,
        cluster: Cluster,
        run_file: Path,
        output: Path,
        *,
        python: Path | str = sys.executable,
        words: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
        log_folder: Path | None = None,
        **environment: str,
    ) -> None:
        self.cluster, self.output = cluster, output
        self.log = (log_folder or output.parent) / f"{output.name}.out"
        self.began = len(self._log())
        self.id = cluster.run(
            "sbatch",
            "--parsable",
            "-N2",
            "--ntasks-per-node=2",
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            f"--chdir={ROOT}",
            *options,
            f"--output={self.log}",
            "slurm/pretrain.sh",
            run_file,
            f"run.output_dir={output}",
            *words,
            cwd=ROOT,
            PYTHON=str(python),
            OMP_NUM_THREADS="1",
            PYTHONPATH=str(ROOT),
            **environment,
        )
        self.attempt = 0
        self.marks = Path(environment["MARKS"]) if "MARKS" in environment else None

    def requeue(self) -> None:
        """Have a job that has ended start anew, as the same job."""
        self.began = len(self._log())
        self.cluster.run("scontrol", "requeue", self.id)
        self.attempt += 1

    def _log(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def words(self) -> str:
        """What this job has said, since it was last queued."""
        return self._log()[self.began :]

    @property
    def state(self) -> str:
        return self.cluster.state(self.id)

    def wait(self) -> str:
        return self.cluster.wait(self.id, timeout=TIMEOUT)

    def until(self, condition: Any, what: str) -> None:
        """Wait for the condition; the job must not end before it holds."""
        until, look = time.monotonic() + TIMEOUT, 0
        while not condition():
            assert time.monotonic() < until, (
                f"not {what} after {TIMEOUT} s; the job's log:\n{self.words()[-4000:]}"
            )
            time.sleep(0.1)
            look += 1
            if look % 20 == 0:  # asking Slurm costs more than looking at files
                assert self.state not in ENDED or condition(), (
                    f"ended before {what}:\n{self.words()[-4000:]}"
                )

    def until_beyond(self, step: int) -> None:
        self.until(lambda: last_step(self.output) > step, f"beyond step {step}")

    def mark(self, rank: int) -> fault_marks.State | None:
        """What a rank of the job is doing, where it was asked to leave that."""
        assert self.marks is not None
        return fault_marks.read(self.marks, self.id, self.attempt, rank)


def metrics(output: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what is of time."""
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


def whole(output: Path) -> list[int]:
    """The steps of the run's whole checkpoints, every hash compared."""
    folders = (output / "checkpoints").glob("step-*")
    return sorted(
        int(folder.name[5:])
        for folder in folders
        if manifest.find_problem(folder, hashes=True) is None
    )


def content(output: Path, step: int) -> dict[str, str]:
    """Hashes of all tensor files of a checkpoint."""
    folder = output / f"checkpoints/step-{step:08d}"
    paths = sorted(folder.rglob("*.safetensors"))
    assert paths, f"nothing in {folder}"
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def rank_processes(output: Path) -> list[int]:
    """Process ids of the ranks of a run that are alive, as their logs name them, the last that began of each rank."""
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
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_same(output: Path, undisturbed: Path, steps: int) -> None:
    """The run has done each step once and in order, with the numbers and at last the tensors of the one that nothing happened to."""
    assert metrics(output) == metrics(undisturbed)
    assert [line["step"] for line in metrics(output) if "loss" in line] == list(range(1, steps + 1))
    assert content(output, steps) == content(undisturbed, steps)
