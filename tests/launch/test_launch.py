"""Starts and ends of local and launched ranks; a failure shows its first cause."""

import os
import signal
import socket
import time
from datetime import datetime

import pytest
from helpers.launches import LONG, runs, signal_again, until

from megatrain.config import loader
from megatrain.errors import ConfigError, UserError
from megatrain.launch.local import run_local


def test_only_rank_0_prints(launch, extensions):
    run = launch("work")
    assert run.wait() == 0
    assert run.text("out") == "4 ranks met\n"
    assert run.text("err") == ""
    threads = max(1, len(os.sched_getaffinity(0)) // 4)
    for rank in range(4):
        first, *lines = run.log(rank).splitlines()
        assert f"rank {rank} of 4" in first
        assert any(line.endswith("INFO 4 ranks met") for line in lines)
        assert f"noise of rank {rank} with {threads} threads, {threads} asked for" in lines
        assert "noise of a child process" in lines
        start, met = run.lines(rank)  # without the output of libraries
        assert (start["message"], start["world_size"]) == ("start", 4)
        assert {**met, "time": None} == {
            "time": None,
            "level": "INFO",
            "rank": rank,
            "host": socket.gethostname(),
            "step": 0,
            "message": "4 ranks met",
        }
        assert datetime.fromisoformat(met["time"]).tzinfo is not None
    # deepspeed has set up its collectives without compiling an extension.
    assert list(extensions.iterdir()) == []


def test_verbose_shows_output_of_libraries(launch):
    run = launch("work", world_size=2, overrides=["run.verbose=true"])
    assert run.wait() == 0
    assert run.text("out").count("noise of a child process") == 2
    assert "2 ranks met" in run.log(1)


def test_traceback_is_shown_and_other_ranks_are_ended(launch):
    run = launch("raise_on_one")
    start = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - start < LONG, "the other ranks wait in a collective for half an hour"
    assert run.text("err").startswith("rank 1 failed:\nTraceback")
    assert "ValueError: the cause\n" in run.text("err")
    assert run.text("err").count("Traceback") == 1
    assert "ValueError: the cause" in run.log(1)
    last = run.lines(1)[-1]
    assert (last["level"], last["rank"]) == ("ERROR", 1)
    assert "ValueError: the cause" in last["message"]


def test_broken_connection_does_not_hide_the_cause(launch):
    run = launch("consequence_first", world_size=2)
    assert run.wait() == 1
    assert run.text("err").startswith("rank 1 failed:")
    assert "Connection closed" not in run.text("err")


def test_broken_connection_is_shown_without_other_cause(launch):
    run = launch("only_consequences", world_size=2)
    assert run.wait() == 1
    assert "Connection closed by peer" in run.text("err")


@pytest.mark.parametrize("launcher", ["launch_locally", "launch_as_torchrun"])
def test_user_error_is_printed_once_without_traceback(launch, launcher):
    run = launch("raise_user_error", launcher=launcher)
    assert run.wait() == 1
    assert run.text("err") == "error: there is no file x.bin\n"
    assert any("Traceback" in run.log(rank) for rank in range(4))


def test_killed_rank_is_reported_with_its_log(launch):
    launch("die").wait()  # an earlier run in the same folder; its log is not shown again
    run = launch("die")
    start = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - start < LONG, "the other ranks wait in a collective for half an hour"
    assert run.text("err").startswith("rank 1 was killed by signal SIGKILL (often: out of memory)")
    assert run.text("err").count("last line of rank 1") == 1
    assert [(event.step, event.fields["cause"]) for event in run.events("fail")] == [
        (None, "rank 1 was killed by signal SIGKILL (often: out of memory)")
    ] * 2


def test_rank_that_exits_is_reported(launch):
    run = launch("leave_with_3")
    assert run.wait() == 1
    assert run.text("err").startswith("rank 1 exited with code 3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_rank_receives_a_signal_once(launch, number):
    run = launch("count_signals")
    run.rank_pids()
    os.killpg(run.pid, number)
    assert run.wait() == 0
    assert [run.text(f"seen-{rank}") for rank in range(4)] == [number.name] * 4
    assert run.text("err") == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_run_prints_nothing(launch, number, code):
    run = launch("sleep", world_size=2)
    ranks = run.rank_pids()
    os.kill(run.pid, number)
    assert run.wait() == code
    assert run.text("err") == ""
    assert not any(runs(pid) for pid in ranks)


def test_second_signal_kills(launch):
    run = launch("ignore_signals", world_size=2)
    ranks = run.rank_pids()
    os.kill(run.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert all(runs(pid) for pid in ranks)
    until(lambda: signal_again(run.pid))  # two pending signals of one kind count as one
    assert run.wait() == 143
    assert not any(runs(pid) for pid in ranks)


def test_ranks_do_not_outlive_a_killed_supervisor(launch):
    run = launch("ignore_signals", world_size=2)
    ranks = run.rank_pids()
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    until(lambda: not any(runs(pid) for pid in ranks))


def test_ranks_of_a_launcher(launch):
    run = launch("work", world_size=2, launcher="launch_as_torchrun")
    assert run.wait() == 0
    assert run.text("out") == "2 ranks met\n"


def test_failing_rank_of_a_launcher_reports_and_exits(launch):
    run = launch("raise_on_one", world_size=2, launcher="launch_as_torchrun")
    assert run.wait() == 1
    assert "rank 1 failed:\nTraceback" in run.text("err")
    assert "ValueError: the cause\n" in run.text("err")


def test_port_in_use_is_refused_before_ranks_start(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = loader.load(
            None, ["train.steps=1", f"run.output_dir={tmp_path}", f"run.master_port={port}"]
        )
        with pytest.raises(
            ConfigError, match=rf"run.master_port={port} must be a free port .*0 picks a free port"
        ):
            run_local(print, run, world_size=2)
    assert list(tmp_path.iterdir()) == []


def test_too_many_local_ranks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = loader.load(
        None,
        [
            "train.steps=1",
            f"run.output_dir={tmp_path}",
            "parallel.data=1000000",
            "train.global_batch_size=1000000",
        ],
    )
    with pytest.raises(
        UserError,
        match=r"requires 1000000 ranks, .* choose a smaller layout, or start the run on several",
    ):
        run_local(print, run, world_size=1_000_000)


def test_output_folder_that_cannot_be_created_is_a_user_error(launch, tmp_path):
    (tmp_path / "file").touch()
    run = launch("work", world_size=2, overrides=[f"run.output_dir={tmp_path}/file/run"])
    assert run.wait() == 1
    assert run.text("err").startswith(
        f"error: run.output_dir={tmp_path}/file/run cannot be written"
    )
