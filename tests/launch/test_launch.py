"""Ranks start, meet and end together, and a failure shows its first cause, whoever started them."""

import os
import signal
import socket
import time
from datetime import datetime

import pytest
from helpers.launches import LONG, runs, signalled, until

from megatrain.config import loader
from megatrain.errors import ConfigError, UserError
from megatrain.launch.local import run_local


def test_ranks_meet_and_only_rank_0_speaks(launch, extensions):
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
        start, met = run.lines(rank)  # and no noise
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
    # Nothing was compiled, although deepspeed has set up its collectives.
    assert list(extensions.iterdir()) == []


def test_verbose_shows_the_noise(launch):
    run = launch("work", world_size=2, overrides=["run.verbose=true"])
    assert run.wait() == 0
    assert run.text("out").count("noise of a child process") == 2
    assert "2 ranks met" in run.log(1)


def test_the_traceback_of_the_rank_that_raised_is_shown_and_the_others_are_ended(launch):
    run = launch("raise_on_one")
    began = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - began < LONG, (
        "the others would wait for it in a collective for half an hour"
    )
    assert run.text("err").startswith("rank 1 failed:\nTraceback")
    assert "ValueError: the cause\n" in run.text("err")
    assert run.text("err").count("Traceback") == 1
    assert "ValueError: the cause" in run.log(1)
    last = run.lines(1)[-1]
    assert (last["level"], last["rank"]) == ("ERROR", 1)
    assert "ValueError: the cause" in last["message"]


def test_a_broken_connection_does_not_hide_what_broke_it(launch):
    run = launch("consequence_first", world_size=2)
    assert run.wait() == 1
    assert run.text("err").startswith("rank 1 failed:")
    assert "Connection closed" not in run.text("err")


def test_a_broken_connection_is_shown_when_nothing_else_is_known(launch):
    run = launch("only_consequences", world_size=2)
    assert run.wait() == 1
    assert "Connection closed by peer" in run.text("err")


@pytest.mark.parametrize("launcher", ["launch_locally", "launch_as_torchrun"])
def test_a_sentence_for_the_user_is_said_once_and_alone(launch, launcher):
    run = launch("raise_user_error", launcher=launcher)
    assert run.wait() == 1
    assert run.text("err") == "error: there is no file x.bin\n"
    assert any("Traceback" in run.log(rank) for rank in range(4))


def test_a_killed_rank_is_named_with_its_last_words(launch):
    launch("die").wait()  # a run before it in the same folder, whose log is not shown again
    run = launch("die")
    began = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - began < LONG, (
        "the others would wait for it in a collective for half an hour"
    )
    assert run.text("err").startswith("rank 1 was killed by SIGKILL (often: out of memory)")
    assert run.text("err").count("last words of rank 1") == 1
    assert [(event.step, event.fields["cause"]) for event in run.events("fail")] == [
        (None, "rank 1 was killed by SIGKILL (often: out of memory)")
    ] * 2


def test_a_rank_that_just_leaves_is_named(launch):
    run = launch("leave_with_3")
    assert run.wait() == 1
    assert run.text("err").startswith("rank 1 ended with exit code 3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_rank_sees_a_signal_once_even_if_the_terminal_sends_it_to_all(launch, number):
    run = launch("count_signals")
    run.rank_pids()
    os.killpg(run.pid, number)
    assert run.wait() == 0
    assert [run.text(f"seen-{rank}") for rank in range(4)] == [number.name] * 4
    assert run.text("err") == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_nothing(launch, number, code):
    run = launch("sleep", world_size=2)
    ranks = run.rank_pids()
    os.kill(run.pid, number)
    assert run.wait() == code
    assert run.text("err") == ""
    assert not any(runs(pid) for pid in ranks)


def test_a_second_signal_kills(launch):
    run = launch("ignore_signals", world_size=2)
    ranks = run.rank_pids()
    os.kill(run.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert all(runs(pid) for pid in ranks)
    until(
        lambda: signalled(run.pid)
    )  # again where the first had not been taken in yet: two at once count as one
    assert run.wait() == 143
    assert not any(runs(pid) for pid in ranks)


def test_ranks_do_not_outlive_a_killed_supervisor(launch):
    run = launch("ignore_signals", world_size=2)
    ranks = run.rank_pids()
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    until(lambda: not any(runs(pid) for pid in ranks))


def test_under_a_launcher_ranks_meet(launch):
    run = launch("work", world_size=2, launcher="launch_as_torchrun")
    assert run.wait() == 0
    assert run.text("out") == "2 ranks met\n"


def test_under_a_launcher_a_failing_rank_says_why_and_leaves(launch):
    run = launch("raise_on_one", world_size=2, launcher="launch_as_torchrun")
    assert run.wait() == 1
    assert "rank 1 failed:\nTraceback" in run.text("err")
    assert "ValueError: the cause\n" in run.text("err")


def test_a_port_in_use_is_refused_before_ranks_start(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = loader.load(
            None, ["train.steps=1", f"run.output_dir={tmp_path}", f"run.master_port={port}"]
        )
        with pytest.raises(
            ConfigError, match=rf"run.master_port={port} cannot be used .*0 takes a free port"
        ):
            run_local(print, run, world_size=2)
    assert list(tmp_path.iterdir()) == []


def test_ranks_beyond_all_measure_are_not_started_here(tmp_path, monkeypatch):
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
        match=r"asks for 1000000 ranks, .* choose a smaller layout, or start the run on several machines",
    ):
        run_local(print, run, world_size=1_000_000)


def test_a_folder_that_cannot_be_made_is_the_users_error(launch, tmp_path):
    (tmp_path / "file").touch()
    run = launch("work", world_size=2, overrides=[f"run.output_dir={tmp_path}/file/run"])
    assert run.wait() == 1
    assert run.text("err").startswith(
        f"error: run.output_dir={tmp_path}/file/run cannot be written"
    )
