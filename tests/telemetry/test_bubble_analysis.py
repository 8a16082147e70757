"""Breakdown of synthetic traces with known results, reading of traces, and the command."""

import json
import random

import pytest
from helpers.messages import split_error
from helpers.synthetic_traces import traced

from megatrain.__main__ import main
from megatrain.pipeline.schedules import SCHEDULES, build_schedule
from megatrain.pipeline.simulator import Times, simulate
from megatrain.telemetry.bubble_analysis import (
    break_down_waiting,
    message_times,
    profile_pipeline,
)
from megatrain.telemetry.trace_format import (
    StepTrace,
    read_traces,
    write_trace,
)

# -- breakdown of a step -------------------------------------------------------------------------


def test_even_stages_wait_for_the_schedule_only():
    """1F1B waits (ranks - 1) x (forward + backward)."""
    splits = break_down_waiting(
        traced(build_schedule("1f1b", 4, 8), Times([1] * 4, [1] * 4, [1] * 4))
    )
    assert [tuple(split) for split in splits] == [pytest.approx((24, 9, 0, 0, 0))] * 4


def test_a_slow_stage_is_imbalance():
    """Stage 1 takes twice as long: 1 + 4 x 6 + 2; even stages of 4.5 would take (4 + 1) x 4.5."""
    splits = break_down_waiting(traced(build_schedule("1f1b", 2, 4), Times([1, 2], [1, 2], [1, 2])))
    assert tuple(splits[0]) == pytest.approx((12, 4.5, 10.5, 0, 0))
    assert tuple(splits[1]) == pytest.approx((24, 4.5, -1.5, 0, 0))
    assert [split.span for split in splits] == pytest.approx([27, 27])


def test_a_slow_link_is_communication():
    """(2 + 1) x 3 without messages, and 10 with these, as the simulator's test works out."""
    pipeline = traced(build_schedule("1f1b", 2, 2), Times([1, 1], [1, 1], [1, 1], send=0.5))
    assert [tuple(split) for split in break_down_waiting(pipeline)] == [
        pytest.approx((6, 3, 0, 0, 1))
    ] * 2
    assert message_times(pipeline) == pytest.approx([0.5, 0.5, 0.5])


def test_uneven_microbatch_is_counted_separately():
    """Both stages take 2 on average; stage 0 takes 5 for the first microbatch."""

    class Uneven(Times):
        def duration(self, action, stage):
            if action.kind == "F" and stage == 0:
                return 5.0 if action.microbatch == 0 else 1.0
            return super().duration(action, stage)

    splits = break_down_waiting(
        traced(build_schedule("gpipe", 2, 4), Uneven([2, 2], [1, 1], [0, 0]))
    )
    assert [tuple(split) for split in splits] == [pytest.approx((12, 3, 0, 3, 0))] * 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_parts_add_up_to_the_waiting(name):
    numbers_of = random.Random(name)
    schedule = build_schedule(name, 3, 7)
    times = Times(
        *([numbers_of.uniform(0.5, 2) for _ in range(schedule.placement.stages)] for _ in range(3)),
        send=0.3,
    )
    timeline = simulate(schedule, times)
    for rank, split in enumerate(break_down_waiting(traced(schedule, times))):
        assert split.compute == pytest.approx(timeline.busy[rank])
        assert split.waiting == pytest.approx(timeline.makespan - timeline.busy[rank])
        assert split.communication > 0
        assert split.microbatches == pytest.approx(0)


def test_replicas_and_steps_are_averaged():
    schedule = build_schedule("1f1b", 2, 4)
    fast, slow = Times([1, 1], [1, 1], [1, 1]), Times([3, 3], [3, 3], [3, 3])
    steps = [
        StepTrace(
            step,
            [
                *traced(schedule, fast, step=step, replicas=2, memory=(5, 6)),
                *traced(schedule, slow, step=step, data=1, replicas=2, memory=(8, 2)),
            ],
        )
        for step in (20, 21)
    ]
    profile = profile_pipeline(steps)
    assert (profile.steps, profile.replicas, profile.tensor, profile.peak_memory) == (
        [20, 21],
        2,
        1,
        [8, 6],
    )
    assert [tuple(split) for split in profile.breakdowns] == [pytest.approx((24, 6, 0, 0, 0))] * 2
    assert profile.timeline.pipeline[0].data == 1, "the slowest pipeline is shown"


# -- reading -------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """Two traced steps of two ranks, and one that an earlier run of three ranks left."""
    for trace in traced(
        build_schedule("1f1b", 3, 4), Times([1] * 3, [1] * 3, [1] * 3), step=2, run=0.5
    ):
        write_trace(tmp_path, trace)
    for step in (4, 5):
        for trace in traced(
            build_schedule("1f1b", 2, 4),
            Times([1, 2], [1, 2], [1, 2]),
            step=step,
            counts=[2, 2],
            layers=lambda kind, layer: 0.25,
        ):
            write_trace(tmp_path, trace)
    return tmp_path


def file(run_folder, step, rank):
    return run_folder / "traces" / f"step-{step:08d}-rank-{rank:05d}.json"


def test_traces_are_read_as_written(run_folder):
    steps = read_traces(run_folder)
    assert [step.step for step in steps] == [4, 5], "traces of an earlier attempt are ignored"
    expected = traced(
        build_schedule("1f1b", 2, 4),
        Times([1, 2], [1, 2], [1, 2]),
        step=4,
        counts=[2, 2],
        layers=lambda kind, layer: 0.25,
    )
    assert steps[0].ranks == expected


def test_the_command_writes_page_trace_and_numbers(run_folder, capsys, tmp_path_factory):
    assert main(["profile", str(run_folder)]) == 0
    printed = capsys.readouterr().out
    assert "bubble 33.3%" in printed
    assert (run_folder / "pipeline_profile.html").exists()
    assert json.loads((run_folder / "pipeline_profile.trace.json").read_text())["traceEvents"]
    page = tmp_path_factory.mktemp("elsewhere") / "page.html"
    assert main(["profile", str(run_folder), "--output", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [4, 5]
    assert page.exists()
    assert page.with_suffix(".trace.json").exists()


def error_of(capsys, folder, *arguments):
    assert main(["profile", str(folder), *arguments]) == 1
    message, _ = split_error(capsys.readouterr().err)
    return message


def test_run_without_traces_is_refused(capsys, tmp_path):
    assert "has no traces; set profile.steps" in error_of(capsys, tmp_path)
    assert "is not a folder" in error_of(capsys, tmp_path / "nowhere")


def test_missing_ranks_are_reported(run_folder, capsys):
    file(run_folder, 5, 1).unlink()
    assert "step 5 of rank 1 (of 2) is missing" in error_of(capsys, run_folder)
    file(run_folder, 4, 0).unlink()
    assert "step 4 of rank 0 is missing" in error_of(capsys, run_folder)


def test_traces_of_different_attempts_are_refused(run_folder, capsys):
    path = file(run_folder, 4, 1)
    path.write_text(path.read_text().replace('"run": 1.0', '"run": 0.7'))
    assert "are of different attempts" in error_of(capsys, run_folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"peak_memory"', '"peak"'),
        lambda text: text.replace('"actions": [', '"actions": [[1], '),
    ],
)
def test_corrupt_file_is_reported(run_folder, capsys, damage):
    path = file(run_folder, 5, 1)
    path.write_text(damage(path.read_text()))
    assert f"{path} is corrupt or not a trace" in error_of(capsys, run_folder)


def test_step_with_missing_actions_is_reported(run_folder, capsys):
    path = file(run_folder, 5, 1)
    raw = json.loads(path.read_text())
    raw["actions"] = raw["actions"][:-1]
    path.write_text(json.dumps(raw))
    assert "step 5 is incomplete: rank 1: missing B3" in error_of(capsys, run_folder)


def test_write_errors_of_the_page_are_reported(run_folder, capsys):
    assert "cannot be written" in error_of(
        capsys, run_folder, "--output", str(run_folder / "no" / "page.html")
    )


def test_old_name_of_the_command_is_refused_with_the_new_name(run_folder, capsys):
    old_name = "xray"
    assert main([old_name, str(run_folder)]) == 2
    message = f"`megatrain {old_name}` was renamed: use `megatrain profile`"
    assert message in capsys.readouterr().err


def test_traces_of_older_versions_are_read(run_folder):
    (run_folder / "traces").rename(run_folder / "trace")
    assert [step.step for step in read_traces(run_folder)] == [4, 5]
