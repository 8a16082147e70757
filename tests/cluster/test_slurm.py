"""Whole runs on a real Slurm of two nodes: what a cluster does to a run leaves it as if nothing had happened."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.slurm_jobs import Job, assert_same, last_step, rank_processes, write_run

pytestmark = pytest.mark.slow
STEPS = 80


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("run"),
        train={"steps": STEPS},
        checkpoint={"save_every": 10, "keep_last": 3},
    )


def test_a_run_through_preemption_a_killed_rank_and_a_lost_node_ends_as_an_undisturbed_one(
    cluster, warm, run_file, tmp_path
):
    output = tmp_path / "disturbed"
    job = Job(cluster, run_file, output, python=warm)
    job.until_beyond(5)
    cluster.run(
        "scancel", "--batch", "--signal=USR1", job.id
    )  # as --signal does before the time is over
    job.until(lambda: "attempt 2" in job.words(), "queued again")
    stopped_at = last_step(output)
    assert f"stopped by a signal after step {stopped_at}" in job.words()
    job.until_beyond(stopped_at + 5)
    assert f"step-{stopped_at:08d}, the newest complete checkpoint" in job.words()

    os.kill(rank_processes(output)[-1], signal.SIGKILL)
    assert job.wait() == "FAILED", job.words()
    assert rank_processes(output) == []

    job = Job(cluster, run_file, output, python=warm)
    job.until_beyond(last_step(output) + 3)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.until(lambda: job.state == "PENDING", "back in the queue")
    cluster.run(
        "scontrol", "update", "nodename=node2", "state=resume", check=False
    )  # where it has not come back by itself
    assert job.wait() == "COMPLETED", job.words()

    undisturbed = Job(
        cluster, run_file, tmp_path / "undisturbed", python=warm, words=("checkpoint.save_every=0",)
    )
    assert undisturbed.wait() == "COMPLETED", undisturbed.words()
    assert_same(output, undisturbed.output, STEPS)


def test_a_mistake_in_the_config_ends_the_job_before_a_rank_starts(cluster, run_file, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(run_file.read_text().replace("micro_batch_size: 1", "micro_batch_size: 3"))
    job = Job(cluster, bad, tmp_path / "never")
    assert job.wait() == "FAILED"
    assert (
        "error: train.global_batch_size=4 must be a multiple of train.micro_batch_size=3"
        in job.words()
    )
    assert "rank" not in job.words()
