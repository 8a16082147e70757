"""Runs in which a rank freezes, dies or fails: all ranks exit and the cause is reported."""

import json
import os
import signal

import pytest
from helpers.launches import runs

SHORT_TIMEOUT = ["run.hang_timeout=6"]
"""Steps of these runs take milliseconds."""


def test_frozen_rank_is_reported_and_all_exit(launch):
    """All cases run at the same time: they wait most of it."""
    cases = [
        (launcher, frozen)
        for launcher in ("launch_locally", "launch_as_torchrun")
        for frozen in (0, 1)
    ]
    frozen_runs = [
        launch(
            "freeze",
            world_size=3,
            launcher=launcher,
            overrides=[*SHORT_TIMEOUT, f"run.seed={frozen}"],
            name=f"{launcher}-{frozen}",
        )
        for launcher, frozen in cases
    ]
    sleeper = launch(
        "sleep_over_data",
        world_size=3,
        launcher="launch_as_torchrun",
        overrides=SHORT_TIMEOUT,
        name="sleeper",
    )
    for (launcher, frozen), run in zip(cases, frozen_runs, strict=True):
        pids = run.rank_pids()
        assert run.wait() == 1
        check_frozen(run, pids, frozen)
        if launcher == "launch_as_torchrun":
            assert json.loads(run.text("codes")) == [
                1 if rank != frozen else -signal.SIGKILL for rank in range(3)
            ]
    check_sleeper(sleeper)


def check_frozen(run, pids, frozen):
    text = run.text("err")
    assert text.startswith("error: training is stalled: no rank has made progress for ")
    assert f"all ranks are waiting for rank {frozen} (" in text
    assert (
        f"process {pids[frozen]}), which does not answer: the process is stopped (SIGSTOP)" in text
    )
    assert text.count("stalled") == 1
    assert not any(runs(pid) for pid in pids)
    alive = {0, 1, 2} - {frozen}
    assert {int(path.stem[-5:]) for path in (run.folder / "stack_traces").iterdir()} == alive
    for rank in alive:
        stacks = run.text(f"stack_traces/rank-{rank:05d}.txt")
        assert "step 3, all-reduce data (F0), for " in stacks
        assert "in all_reduce\n" in stacks
    (event,) = run.events("stall")
    assert event.step == 3
    assert f"all ranks are waiting for rank {frozen}" in event.fields["cause"]


def check_sleeper(run):
    pids = run.rank_pids()
    assert run.wait() == 1
    assert f"process {pids[1]}), which has been in step 3, loading data for " in run.text("err")
    assert "  rank 2: step 3, all-reduce data (F0), for " in run.text("err")
    assert "in sleep_over_data" in run.text("stack_traces/rank-00001.txt")
    assert json.loads(run.text("codes")) == [1, 1, 1]


@pytest.mark.parametrize("killed", [0, 2])
def test_killed_rank_is_reported_by_another_under_a_launcher(launch, killed):
    run = launch(
        "vanish", world_size=3, launcher="launch_as_torchrun", overrides=[f"run.seed={killed}"]
    )
    pids = run.rank_pids()
    assert run.wait() == 1
    text = run.text("err")
    assert text.startswith(f"rank {killed} (")
    assert f"process {pids[killed]}) exited without reporting an error (often: killed" in text
    assert f"last line of rank {killed}" in text
    assert text.splitlines()[-1].startswith(
        "there is no complete checkpoint (checkpoint.save_every=0 saves only at the end)"
    )
    (event,) = run.events("fail")
    assert event.fields["cause"].startswith(f"rank {killed} (")
    assert "Connection closed" not in text
    assert "Traceback" not in text


def test_only_the_cause_is_printed_under_a_launcher(launch):
    run = launch("raise_in_step", world_size=3, launcher="launch_as_torchrun")
    assert run.wait() == 1
    assert run.text("err").startswith("rank 1 failed:\nTraceback")
    assert "ValueError: the cause\n" in run.text("err")
    assert run.text("err").count("Traceback") == 1
    assert "the cause" in run.log(0)  # the log of every rank ends with the cause


def test_ranks_restarted_by_torchrun_ignore_keys_of_the_last_attempt(launch):
    run = launch(
        "raise_in_steps_to_come",
        world_size=2,
        launcher="launch_as_torchrun_again",
        overrides=["run.seed=1"],
    )
    assert run.wait() == 0
    assert run.text("err").count("ValueError: the cause in step 1") == 1
    assert json.loads(run.text("codes")) == [0, 0]


def test_elastic_error_file(tmp_path, monkeypatch):
    from megatrain.launch.failure_reporter import write_elastic_error_file

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    write_elastic_error_file("the cause")
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    failure = ProcessFailure(
        local_rank=0, pid=os.getpid(), exitcode=1, error_file=str(tmp_path / "error.json")
    )
    assert (
        failure.message["extraInfo"]["py_callstack"] == "the cause"
    )  # torchrun's report prints it


# -- restarts --------------------------------------------------------------------------------


def test_ranks_are_restarted_until_they_finish(launch):
    run = launch(
        "raise_in_steps_to_come", world_size=2, overrides=["run.seed=2", "run.max_restarts=2"]
    )
    assert run.wait() == 0
    assert "ValueError: the cause in step 1" in run.text("err")
    assert "restart 1 of 2 (run.max_restarts) after a failure in step 1" in run.text("err")
    assert "restart 2 of 2 (run.max_restarts) after a failure in step 2" in run.text("err")
    assert [
        (event.fields["restart"], event.fields["cause"]) for event in run.events("restart")
    ] == [
        (1, "rank 1 failed: ValueError: the cause in step 1"),
        (2, "rank 1 failed: ValueError: the cause in step 2"),
    ]


def test_run_fails_after_max_restarts(launch):
    run = launch(
        "raise_in_steps_to_come", world_size=2, overrides=["run.seed=3", "run.max_restarts=1"]
    )
    assert run.wait() == 1
    *_, not_restarted, hint = run.text("err").splitlines()
    assert not_restarted == "not restarted: it was restarted 1 times (run.max_restarts=1)"
    assert hint.startswith("there is no complete checkpoint (")


def test_step_that_fails_twice_is_not_restarted(launch):
    run = launch("vanish", world_size=2, overrides=["run.seed=1", "run.max_restarts=9"])
    assert run.wait() == 1
    assert run.text("err").count("rank 1 was killed by signal SIGKILL") == 2
    assert (
        run.text("err").splitlines()[-2]
        == "not restarted: step 3 failed twice (run.max_restarts=9)"
    )
    assert [event.fields["restart"] for event in run.events("restart")] == [1]
    (event,) = run.events("fail")
    assert event.fields["reason"] == "step 3 failed twice"


def test_user_errors_are_not_restarted(launch):
    run = launch("raise_user_error", world_size=2, overrides=["run.max_restarts=9"])
    assert run.wait() == 1
    assert run.text("err") == "error: there is no file x.bin\n"
