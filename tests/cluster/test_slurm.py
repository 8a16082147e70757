"""Runs on a real Slurm of two nodes: preemption and lost nodes change no metric and no tensor."""

from __future__ import annotations

import os
import signal

import pytest
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


def test_preemption_a_killed_rank_and_a_lost_node_change_no_result(
    cluster, warm, run_file, tmp_path
):
    output = tmp_path / "disturbed"
    job = Job(cluster, run_file, output, python=warm)
    job.until_beyond(5)
    # As --signal does before the time limit.
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.until(lambda: "attempt 2" in job.log(), "requeued")
    stopped_at = last_step(output)
    assert f"stopped by a signal after step {stopped_at}" in job.log()
    job.until_beyond(stopped_at + 5)
    assert f"step-{stopped_at:08d}, the newest complete checkpoint" in job.log()

    os.kill(rank_processes(output)[-1], signal.SIGKILL)
    assert job.wait() == "FAILED", job.log()
    assert rank_processes(output) == []

    job = Job(cluster, run_file, output, python=warm)
    job.until_beyond(last_step(output) + 3)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.until(lambda: job.state == "PENDING", "back in the queue")
    # The node may have come back by itself.
    cluster.run("scontrol", "update", "nodename=node2", "state=resume", check=False)
    assert job.wait() == "COMPLETED", job.log()

    undisturbed = Job(
        cluster,
        run_file,
        tmp_path / "undisturbed",
        python=warm,
        overrides=("checkpoint.save_every=0",),
    )
    assert undisturbed.wait() == "COMPLETED", undisturbed.log()
    assert_same(output, undisturbed.output, STEPS)


def test_invalid_config_ends_the_job_before_a_rank_starts(cluster, run_file, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(run_file.read_text().replace("micro_batch_size: 1", "micro_batch_size: 3"))
    job = Job(cluster, bad, tmp_path / "never")
    assert job.wait() == "FAILED"
    assert (
        "error: train.global_batch_size=4 must be a multiple of train.micro_batch_size=3"
        in job.log()
    )
    assert "rank" not in job.log()
