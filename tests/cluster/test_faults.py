"""Faults other than a killed process: full disks, damaged files, slow ranks, clocks and names.

After each fault all complete checkpoints are still complete, and the log has a sentence about it.
The run ends with the metrics and tensors of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time

import pytest
from helpers.netns_slurm import Cluster
from helpers.slurm_jobs import (
    ENDED,
    Job,
    assert_same,
    complete_steps,
    is_alive,
    last_step,
    metrics,
    rank_processes,
    write_run,
)

from megatrain.distributed.env import expand_hosts

pytestmark = pytest.mark.chaos
STEPS = 60


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("run"),
        train={
            "steps": STEPS,
        },
        checkpoint={"save_every": 5, "keep_last": 3},
        eval={"every": 20, "batches": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(cluster, warm, run_file):
    job = Job(cluster, run_file, run_file.parent / "undisturbed", python=warm)
    assert job.wait() == "COMPLETED", job.log()
    return job.output


@pytest.fixture
def submit(cluster, warm, run_file, tmp_path):
    """Returns a function that submits the run, by default to the same output folder."""

    def submit(*overrides, output=tmp_path / "run", **more):
        (tmp_path / "marks").mkdir(exist_ok=True)
        return Job(
            cluster,
            run_file,
            output,
            python=warm,
            overrides=overrides,
            log_folder=tmp_path,
            MARKS=str(tmp_path / "marks"),
            **more,
        )

    return submit


def kill(job, rank):
    """Kills a rank and waits for the end of the job."""
    os.kill(job.mark(rank).process, signal.SIGKILL)
    assert job.wait() == "FAILED", job.log()


def fill(disk):
    """Fills a file system."""
    with contextlib.suppress(OSError), (disk / "ballast").open("ab", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass


def test_full_disk_while_a_checkpoint_is_written(cluster, submit, undisturbed):
    output = cluster.disk / "run"
    job = submit(output=output, MARKS_SLOW="0.03")
    job.until(lambda: len(complete_steps(output)) > 1 and "saving" in job.mark(0).active, "saving")
    before = complete_steps(output)
    fill(cluster.disk)
    assert job.wait() == "FAILED"
    assert "No space left on device" in job.log()
    assert "Traceback" not in job.log(), job.log()
    assert set(before[-2:]) <= set(complete_steps(output))

    # A start would delete incomplete checkpoints to free space.
    for incomplete in (output / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(incomplete)
    fill(cluster.disk)
    job.requeue()  # `megatrain check` of a new job would report the full disk
    assert job.wait() == "FAILED"
    assert "No space left on device" in job.log()
    assert "Traceback" not in job.log(), job.log()
    assert set(before[-2:]) <= set(complete_steps(output))

    (cluster.disk / "ballast").unlink()
    job = submit(output=output)
    assert job.wait() == "COMPLETED", job.log()
    assert_same(output, undisturbed, STEPS)
    shutil.rmtree(output)


def test_damaged_checkpoints_are_skipped(submit, undisturbed):
    job = submit()
    job.until(lambda: len(complete_steps(job.output)) > 2, "three checkpoints")
    kill(job, 1)
    older, newer = (
        job.output / f"checkpoints/step-{step:08d}" for step in complete_steps(job.output)[-2:]
    )
    file = newer / "optimizer/rank-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    job = submit()
    job.until(lambda: "skipped: " in job.log(), "skipped: ")
    assert (
        f"resuming from {older}, the newest complete checkpoint; skipped: "
        f"{newer.name} has {file.stat().st_size} bytes in optimizer/rank" in job.log()
    )

    job.until(
        lambda: newer.name[5:] < f"{max(complete_steps(job.output), default=0):08d}", "newer ones"
    )
    kill(job, 2)
    older, newer = (
        job.output / f"checkpoints/step-{step:08d}" for step in complete_steps(job.output)[-2:]
    )
    file = newer / "optimizer/rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    job = submit("checkpoint.verify=full")
    assert job.wait() == "COMPLETED", job.log()
    assert (
        f"resuming from {older}, the newest complete checkpoint; skipped: "
        f"{newer.name} has other content in optimizer/rank" in job.log()
    )
    assert_same(job.output, undisturbed, STEPS)


def test_frozen_rank_ends_the_job_and_a_requeue_resumes(submit, undisturbed):
    job = submit("run.hang_timeout=20")
    job.until_beyond(7)
    process = job.mark(1).process
    os.kill(process, signal.SIGSTOP)
    assert job.wait() == "FAILED"
    message = (
        r"error: training is stalled: no rank has made progress for \d+ s \(run.hang_timeout\); "
        rf"all ranks are waiting for rank 1 \(node1, process {process}\)"
    )
    assert re.search(message, job.log()), job.log()
    assert (job.output / "stack_traces/rank-00000.txt").exists()
    assert not is_alive(process)
    job.requeue()
    assert job.wait() == "COMPLETED", job.log()
    assert_same(job.output, undisturbed, STEPS)


def test_slow_rank_delays_the_run_only(submit, undisturbed):
    """The rank is stopped for most of the time, so that the others wait at every message."""
    job = submit("run.hang_timeout=20")
    job.until(lambda: job.mark(2) is not None, "started")
    process, ended = job.mark(2).process, threading.Event()
    with contextlib.suppress(ProcessLookupError):
        while job.state not in ENDED and not ended.wait(0.05):
            for _ in range(10):
                os.kill(process, signal.SIGSTOP)
                time.sleep(0.05)
                os.kill(process, signal.SIGCONT)
                time.sleep(0.02)
    assert job.wait() == "COMPLETED", job.log()
    assert_same(job.output, undisturbed, STEPS)


def test_wrong_clocks(cluster, submit, undisturbed):
    """A clock is three days behind and checkpoints have wrong times: steps define the newest."""
    job = submit(MARKS_CLOCK="node2:-259200")
    job.until(lambda: len(complete_steps(job.output)) > 2, "three checkpoints")
    kill(job, 0)
    steps = complete_steps(job.output)
    for age, step in enumerate(steps):
        folder = job.output / f"checkpoints/step-{step:08d}"
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (0, (len(steps) - 1 - age) * 4e9 / len(steps)))
    job = submit(MARKS_CLOCK="node1:1e7")
    assert job.wait() == "COMPLETED", job.log()
    assert f"resuming from {job.output}/checkpoints/step-{steps[-1]:08d}, the newest" in job.log()
    assert complete_steps(job.output) == [STEPS - 10, STEPS - 5, STEPS]
    assert_same(job.output, undisturbed, STEPS)


# -- host names ------------------------------------------------------------------------------------


def test_node_lists_expand_as_in_slurm(cluster):
    for text in (
        "node[1-2]",
        "gpu-a-[007,009-011],gpu-b-7",
        "x[098-101]",
        "rack[1-2]-[3-4],login",
        "a[08-10],b,c1-2",
    ):
        assert " ".join(expand_hosts(text)) == " ".join(
            cluster.run("scontrol", "show", "hostnames", text).split()
        ), text


def test_other_host_names(programs, warm, run_file, undisturbed, tmp_path):
    """Names have hyphens, digits and a domain; then the name of the first node does not resolve."""
    cluster = Cluster(
        tmp_path / "named",
        programs=programs,
        names=("gpu-a-007", "gpu-a-010"),
        domain=".cluster.example",
    )
    try:
        cluster.start()
        job = Job(cluster, run_file, tmp_path / "run", python=warm)
        assert job.wait() == "COMPLETED", job.log()
        assert "on gpu-a-[007,010], attempt 1" in job.log()
        assert (
            " on gpu-a-010.cluster.example, process"
            in (job.output / "logs/rank-00003.log").read_text()
        )
        assert_same(job.output, undisturbed, STEPS)
    finally:
        cluster.stop()
    cluster = Cluster(tmp_path / "unknown", programs=programs, names=("n1", "n2"), unknown=("n1",))
    try:
        cluster.start()
        job = Job(cluster, run_file, tmp_path / "nowhere", python=warm)
        assert job.wait() == "FAILED"
        message = "error: n2 cannot resolve the rendezvous address n1 ("
        assert message in job.log(), job.log()
        assert "Traceback" not in job.log(), job.log()
    finally:
        cluster.stop()


# -- signals ---------------------------------------------------------------------------------------


def test_signals_while_a_checkpoint_is_written(cluster, submit, undisturbed):
    """Several signals arrive during one save; all checkpoints are complete afterwards."""
    job = submit(MARKS_SLOW="0.03")
    job.until(lambda: last_step(job.output) > 5 and "saving" in job.mark(0).active, "saving")
    for number in ("USR1", "USR1", "USR1"):
        cluster.run("scancel", "--batch", f"--signal={number}", job.id)
        time.sleep(0.1)
    job.until(lambda: "attempt 2" in job.log(), "requeued")
    assert "stopped by a signal after step" in job.log()
    assert complete_steps(job.output)[-1] == last_step(job.output)
    job.attempt = 1
    job.until(
        lambda: (
            last_step(job.output) > complete_steps(job.output)[-1]
            and "saving" in job.mark(0).active
        ),
        "saving",
    )
    for rank in rank_processes(job.output):
        os.kill(rank, signal.SIGTERM)
        os.kill(rank, signal.SIGUSR1)
        os.kill(rank, signal.SIGTERM)
    assert job.wait() == "COMPLETED", job.log()
    assert complete_steps(job.output)[-1] == last_step(job.output) < STEPS
    job = submit()
    assert job.wait() == "COMPLETED", job.log()
    assert_same(job.output, undisturbed, STEPS)


def test_signal_before_the_ranks_start(cluster, submit, undisturbed):
    job = submit()
    job.until(lambda: "attempt 1" in job.log(), "started")  # now the job checks the config
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.until(lambda: "attempt 2" in job.log(), "requeued")
    assert job.wait() == "COMPLETED", job.log()
    assert_same(job.output, undisturbed, STEPS)


def test_time_limit(submit, undisturbed):
    """Slurm sends the signal before the time limit, and the next attempt of the job resumes."""
    job = submit(
        "train.steps=100000",
        "checkpoint.save_every=1",
        MARKS_SLOW="0.1",
        options=("--time=2", "--signal=B:USR1@70"),
    )
    job.until(lambda: "attempt 2" in job.log(), "requeued")
    assert f"job {job.id} is requeued" in job.log()
    # Slurm signals up to 30 s early: on a busy machine before the first step.
    stopped_at = max(complete_steps(job.output), default=0)
    assert (
        "stopped by a signal" not in job.log()
        or f"stopped by a signal after step {stopped_at};" in job.log()
    )
    job.until(lambda: last_step(job.output) > stopped_at, "a step of the next attempt")
    assert not stopped_at or f"step-{stopped_at:08d}, the newest complete checkpoint" in job.log()
    job.cluster.run("scancel", job.id)
    job.wait()
    lines = metrics(job.output)
    assert [line["step"] for line in lines] == list(range(len(lines)))
