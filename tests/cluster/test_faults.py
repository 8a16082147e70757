"""What machines do beside killing a process: full disks, damaged files, slow ranks, clocks and names that are off.

Each leaves whole what was whole, is said in a sentence, and the run ends as if it had not happened.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.netns_slurm import Cluster
from helpers.slurm_jobs import (
    ENDED,
    Job,
    assert_same,
    is_alive,
    last_step,
    metrics,
    rank_processes,
    whole,
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
    assert job.wait() == "COMPLETED", job.words()
    return job.output


@pytest.fixture
def submit(cluster, warm, run_file, tmp_path):
    """Submits the run, to the same output each time unless told otherwise."""

    def submit(*words, output=tmp_path / "run", **more):
        (tmp_path / "marks").mkdir(exist_ok=True)
        return Job(
            cluster,
            run_file,
            output,
            python=warm,
            words=words,
            log_folder=tmp_path,
            MARKS=str(tmp_path / "marks"),
            **more,
        )

    return submit


def kill(job, rank):
    """Kill a rank, and wait for the end of the job."""
    os.kill(job.mark(rank).process, signal.SIGKILL)
    assert job.wait() == "FAILED", job.words()


def fill(disk):
    """Leave no byte of a file system free."""
    with contextlib.suppress(OSError), (disk / "ballast").open("ab", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass


def test_a_disk_that_is_full_while_a_checkpoint_is_written(cluster, submit, undisturbed):
    output = cluster.disk / "run"
    job = submit(output=output, MARKS_SLOW="0.03")
    job.until(lambda: len(whole(output)) > 1 and "saving" in job.mark(0).active, "saving")
    there = whole(output)
    fill(cluster.disk)
    assert job.wait() == "FAILED"
    assert "No space left on device" in job.words()
    assert "Traceback" not in job.words(), job.words()
    assert set(there[-2:]) <= set(whole(output))

    for half_written in (output / "checkpoints").glob(".tmp-*"):  # a start would make room by that
        shutil.rmtree(half_written)
    fill(cluster.disk)
    job.requeue()  # a new job's `megatrain check` would see it
    assert job.wait() == "FAILED"
    assert "No space left on device" in job.words()
    assert "Traceback" not in job.words(), job.words()
    assert set(there[-2:]) <= set(whole(output))

    (cluster.disk / "ballast").unlink()
    job = submit(output=output)
    assert job.wait() == "COMPLETED", job.words()
    assert_same(output, undisturbed, STEPS)
    shutil.rmtree(output)


def test_damaged_checkpoints_are_passed_over(submit, undisturbed):
    job = submit()
    job.until(lambda: len(whole(job.output)) > 2, "three checkpoints")
    kill(job, 1)
    older, newer = (job.output / f"checkpoints/step-{step:08d}" for step in whole(job.output)[-2:])
    file = newer / "optimizer/rank-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    job = submit()
    job.until(lambda: "skipped: " in job.words(), "skipped: ")
    assert (
        f"resuming from {older}, the newest complete checkpoint; skipped: {newer.name} has {file.stat().st_size} bytes in optimizer/rank"
        in job.words()
    )

    job.until(lambda: newer.name[5:] < f"{max(whole(job.output), default=0):08d}", "newer ones")
    kill(job, 2)
    older, newer = (job.output / f"checkpoints/step-{step:08d}" for step in whole(job.output)[-2:])
    file = newer / "optimizer/rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    job = submit("checkpoint.verify=full")
    assert job.wait() == "COMPLETED", job.words()
    assert (
        f"resuming from {older}, the newest complete checkpoint; skipped: {newer.name} has other content in optimizer/rank"
        in job.words()
    )
    assert_same(job.output, undisturbed, STEPS)


def test_a_frozen_rank_ends_the_job_which_goes_on_when_queued_again(submit, undisturbed):
    job = submit("run.hang_timeout=20")
    job.until_beyond(7)
    process = job.mark(1).process
    os.kill(process, signal.SIGSTOP)
    assert job.wait() == "FAILED"
    words = rf"error: training is stalled: no rank has made progress for \d+ s \(run.hang_timeout\); all ranks are waiting for rank 1 \(node1, process {process}\)"
    assert re.search(words, job.words()), job.words()
    assert (job.output / "stack_traces/rank-00000.txt").exists()
    assert not is_alive(process)
    job.requeue()
    assert job.wait() == "COMPLETED", job.words()
    assert_same(job.output, undisturbed, STEPS)


def test_a_slow_rank_is_waited_for(submit, undisturbed):
    """Stopped for most of the time: the others wait for it at every message, and nothing else happens."""
    job = submit("run.hang_timeout=20")
    job.until(lambda: job.mark(2) is not None, "there")
    process, over = job.mark(2).process, threading.Event()
    with contextlib.suppress(ProcessLookupError):
        while job.state not in ENDED and not over.wait(0.05):
            for _ in range(10):
                os.kill(process, signal.SIGSTOP)
                time.sleep(0.05)
                os.kill(process, signal.SIGCONT)
                time.sleep(0.02)
    assert job.wait() == "COMPLETED", job.words()
    assert_same(job.output, undisturbed, STEPS)


def test_clocks_that_are_off(cluster, submit, undisturbed):
    """A node three days behind, and checkpoints from the future and from 1970: what is newest is told by steps."""
    job = submit(MARKS_CLOCK="node2:-259200")
    job.until(lambda: len(whole(job.output)) > 2, "three checkpoints")
    kill(job, 0)
    steps = whole(job.output)
    for age, step in enumerate(steps):
        folder = job.output / f"checkpoints/step-{step:08d}"
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (0, (len(steps) - 1 - age) * 4e9 / len(steps)))
    job = submit(MARKS_CLOCK="node1:1e7")
    assert job.wait() == "COMPLETED", job.words()
    assert f"resuming from {job.output}/checkpoints/step-{steps[-1]:08d}, the newest" in job.words()
    assert whole(job.output) == [STEPS - 10, STEPS - 5, STEPS]
    assert_same(job.output, undisturbed, STEPS)


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_node_lists_mean_what_slurm_says(cluster):
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


def test_nodes_of_other_names(programs, warm, run_file, undisturbed, tmp_path):
    """Hyphens, digits and a domain; then a first node that only Slurm knows."""
    cluster = Cluster(
        tmp_path / "named",
        programs=programs,
        names=("gpu-a-007", "gpu-a-010"),
        domain=".cluster.example",
    )
    try:
        cluster.start()
        job = Job(cluster, run_file, tmp_path / "run", python=warm)
        assert job.wait() == "COMPLETED", job.words()
        assert "on gpu-a-[007,010], attempt 1" in job.words()
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
        assert (
            "error: the ranks are to meet on n1, and n2 knows no address of that name"
            in job.words()
        ), job.words()
        assert "Traceback" not in job.words(), job.words()
    finally:
        cluster.stop()


# ---------------------------------------------------------------------------------------------------------------------
# signals


def test_signals_while_a_checkpoint_is_written(cluster, submit, undisturbed):
    """One that asks to stop, and then more, while the ranks write: all there is in the end is whole."""
    job = submit(MARKS_SLOW="0.03")
    job.until(lambda: last_step(job.output) > 5 and "saving" in job.mark(0).active, "saving")
    for number in ("USR1", "USR1", "USR1"):
        cluster.run("scancel", "--batch", f"--signal={number}", job.id)
        time.sleep(0.1)
    job.until(lambda: "attempt 2" in job.words(), "queued again")
    assert "stopped by a signal after step" in job.words()
    assert whole(job.output)[-1] == last_step(job.output)
    job.attempt = 1
    job.until(
        lambda: last_step(job.output) > whole(job.output)[-1] and "saving" in job.mark(0).active,
        "saving",
    )
    for rank in rank_processes(job.output):
        os.kill(rank, signal.SIGTERM)
        os.kill(rank, signal.SIGUSR1)
        os.kill(rank, signal.SIGTERM)
    assert job.wait() == "COMPLETED", job.words()
    assert whole(job.output)[-1] == last_step(job.output) < STEPS
    job = submit()
    assert job.wait() == "COMPLETED", job.words()
    assert_same(job.output, undisturbed, STEPS)


def test_a_signal_before_the_ranks_are_there(cluster, submit, undisturbed):
    job = submit()
    job.until(lambda: "attempt 1" in job.words(), "begun")  # and now it checks the config
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.until(lambda: "attempt 2" in job.words(), "queued again")
    assert job.wait() == "COMPLETED", job.words()
    assert_same(job.output, undisturbed, STEPS)


def test_time_that_runs_out(submit, undisturbed):
    """Slurm itself sends the signal before a job's time is over, and the job goes on from there as its next attempt."""
    job = submit(
        "train.steps=100000",
        "checkpoint.save_every=1",
        MARKS_SLOW="0.1",
        options=("--time=2", "--signal=B:USR1@70"),
    )
    job.until(lambda: "attempt 2" in job.words(), "queued again")
    assert f"job {job.id} goes back into the queue" in job.words()
    stopped_at = max(
        whole(job.output), default=0
    )  # Slurm signals up to half a minute early: on a busy machine before there is a step
    assert (
        "stopped by a signal" not in job.words()
        or f"stopped by a signal after step {stopped_at};" in job.words()
    )
    job.until(lambda: last_step(job.output) > stopped_at, "beyond it")
    assert not stopped_at or f"step-{stopped_at:08d}, the newest complete checkpoint" in job.words()
    job.cluster.run("scancel", job.id)
    job.wait()
    lines = metrics(job.output)
    assert [line["step"] for line in lines] == list(range(len(lines)))
