"""Launchers of docs/multi-node.md besides slurm/pretrain.sh give the same run on two nodes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from helpers.slurm_jobs import ROOT, TIMEOUT, Job, assert_same, write_run

pytestmark = pytest.mark.chaos
STEPS = 4
BIN = Path(sys.executable).parent
TORCHRUN = """#SBATCH --ntasks-per-node=1
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 2 --rdzv-backend c10d \
--rdzv-endpoint "$(scontrol show hostnames | head -n1):29500" --rdzv-id "$SLURM_JOB_ID" \
megatrain/pretrain.py"""
DEEPSPEED = """#SBATCH --ntasks-per-node=2
scontrol show hostnames | sed 's/$/ slots=2/' > {folder}/hosts
deepspeed --hostfile {folder}/hosts --launcher slurm --launcher_args=--ntasks-per-node=2 \
--no_ssh_check --master_addr "$(scontrol show hostnames | head -n1)" megatrain/pretrain.py"""
DEEPSPEED_PER_NODE = """#SBATCH --ntasks-per-node=1
scontrol show hostnames | sed 's/$/ slots=2/' > {folder}/hosts
export MASTER=$(scontrol show hostnames | head -n1)
srun bash -c 'deepspeed --hostfile {folder}/hosts --no_ssh --node_rank $SLURM_NODEID \
--master_addr $MASTER "$@"' - megatrain/pretrain.py"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), train={"steps": STEPS})


@pytest.fixture(scope="module")
def undisturbed(cluster, warm, run_file):
    job = Job(cluster, run_file, run_file.parent / "undisturbed", python=warm)
    assert job.wait() == "COMPLETED", job.log()
    return job.output


@pytest.mark.parametrize(
    "commands",
    [TORCHRUN, DEEPSPEED, DEEPSPEED_PER_NODE],
    ids=["torchrun", "deepspeed", "deepspeed-per-node"],
)
def test_two_nodes(commands, cluster, run_file, undisturbed, tmp_path):
    output, log = tmp_path / "run", tmp_path / "out"
    script = tmp_path / "job.sh"
    script.write_text(
        f"#!/bin/bash\n{commands.format(folder=tmp_path)} {run_file} "
        f"run.output_dir={shlex.quote(str(output))}\n"
    )
    job = cluster.run(
        "sbatch",
        "--parsable",
        "-N2",
        "--cpus-per-task=1",
        f"--chdir={ROOT}",
        f"--output={log}",
        script,
        cwd=ROOT,
        PATH=f"{BIN}:{cluster.environment['PATH']}",
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    assert cluster.wait(job, timeout=TIMEOUT) == "COMPLETED", log.read_text()[-6000:]
    assert_same(output, undisturbed, STEPS)
