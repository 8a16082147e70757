"""Traces of real runs: the run is unchanged, clocks agree, and advice is right."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers.rank_pool import run_ranks
from helpers.sleeping_stage import sleeping
from helpers.training_runs import VOCABULARY, lines, losses, pretrain, write_tokens

from megatrain.config import loader as configuration
from megatrain.distributed.mesh import make_mesh
from megatrain.errors import ConfigError
from megatrain.models.config import load_hf_config, read_config
from megatrain.pipeline.executor import ActionTiming
from megatrain.pipeline.schedule import Action, Placement
from megatrain.pipeline.schedules import build_schedule
from megatrain.pipeline.stage_builder import rank_specs
from megatrain.report.bottlenecks import advise
from megatrain.telemetry.bubble_analysis import profile_pipeline
from megatrain.telemetry.trace_format import read_traces, schedule_of
from megatrain.training.shared_clock import Offset, SharedClock
from megatrain.training.trace_recorder import Mark, traced_actions

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def settings(data, output, *, train=(), traced=None, **parallel):
    """Returns a run's config as nested mappings."""
    return {
        "run": {"output_dir": str(output)},
        "model": LLAMA,
        "data": {"train": str(data), "sequence_length": 16},
        "parallel": parallel,
        "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, **dict(train)},
        "profile": {"steps": traced},
    }


# -- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, {}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "schedule": "zb-v"}),
        (4, {"tensor": 2, "pipeline": 2, "schedule": "interleaved"}),
        (2, {"zero": 3}),
    ],
    ids=str,
)
def test_trace_has_every_action_and_layer_and_does_not_change_the_run(
    world, parallel, data, tmp_path
):
    for name, trace in (("plain", None), ("traced", [2, 3])):
        run_ranks(
            pretrain,
            world,
            settings(data, tmp_path / name, traced=trace, **parallel),
            folder=tmp_path,
        )
    assert losses(tmp_path / "plain") == losses(tmp_path / "traced")
    assert not (tmp_path / "plain" / "traces").exists()
    steps = read_traces(tmp_path / "traced")
    assert [step.step for step in steps] == [2, 3]
    ranks = parallel.get("pipeline", 1)
    for step in steps:
        assert len(step.ranks) == world
        for pipeline in step.pipelines():
            assert [trace.pipeline for trace in pipeline] == list(range(ranks))
            data_size = world // (ranks * parallel.get("tensor", 1))
            expected = build_schedule(parallel.get("schedule", "1f1b"), ranks, 4 // data_size)
            assert schedule_of(pipeline).actions == expected.actions
            for trace in pipeline:
                check_rank(trace)
    assert profile_pipeline(steps).measured.titles == [
        "embedding",
        *(f"block {number}" for number in range(6)),
        "head",
    ]


def check_rank(trace):
    """Checks that actions follow each other within the step, and that layers fill them."""
    assert trace.clock_error == 0, "one machine"
    assert trace.peak_memory > 2**20
    moments = [moment for a in trace.actions for moment in (a.start, a.ready, a.end)]
    assert moments == sorted(moments)
    assert moments[-1] - moments[0] < trace.seconds
    sizes = np.cumsum([0, *map(len, trace.stages)])
    for a in trace.actions:
        stage = trace.placement.stage(trace.pipeline, a.action.chunk)
        mine = set(range(sizes[stage], sizes[stage + 1]))
        assert set(a.layers) == (
            set() if a.action.kind == "W" else mine if a.action.kind == "F" else mine - {0}
        )
        assert all(seconds > 0 for seconds in a.layers.values())
        assert sum(a.layers.values()) <= a.end - a.ready


def hooks_left(rank, world_size, raw, folder):
    from megatrain.training.step_runner import StepRunner
    from megatrain.training.trace_recorder import TraceRecorder

    config = configuration.from_dict(raw)
    runner = StepRunner(
        config, read_config(load_hf_config(config.model)), make_mesh(rank), torch.device("cpu")
    )
    recorder = TraceRecorder(runner, Path(folder), range(2, 4))
    recorder.on_step_begin(None, 2)
    during = sum(len(layer._forward_hooks) for layer in runner.stage.layers)
    recorder.on_step_end(None, None, {})
    recorder.on_step_begin(None, 4)
    outside = runner.executor.action_timings
    recorder.on_step_end(None, None, {})
    return (
        during,
        sum(
            len(layer._forward_hooks) + len(layer._forward_pre_hooks)
            for layer in runner.stage.layers
        ),
        outside,
        runner.executor.action_timings,
    )


def test_hooks_exist_in_recorded_steps_only(data, tmp_path):
    assert run_ranks(
        hooks_left,
        1,
        settings(data, tmp_path, traced=[2, 3]),
        str(tmp_path),
        folder=tmp_path,
    ) == [(8, 0, None, None)]


def test_first_layer_shows_the_arrival_of_a_message_on_a_stream():
    """The host is ready at 1; the stream reaches the layers at 5, 6 and 8; the offset is 10."""
    marks = [
        Mark("entered", 3, 1.1, 5.0),
        Mark("left", 3, 1.2, 6.0),
        Mark("left", 4, 1.3, 8.0),
        Mark("gradient", 4, 9.2, 11.0),
        Mark("gradient", 3, 9.3, 12.0),
        Mark("gradient", 2, 9.4, 15.0),
    ]
    records = [
        ActionTiming(Action("F", 0), 0.5, 1.0, 8.5),
        ActionTiming(Action("B", 0), 8.5, 9.0, 16.0),
        ActionTiming(Action("W", 0), 16.0, 16.0, 17.0),
    ]
    forward, backward, weights = traced_actions(records, marks, Offset(10.0, 0.0), on_stream=True)
    assert (forward.start, forward.ready, forward.end) == (10.5, 15.0, 18.5)
    assert forward.layers == pytest.approx({3: 1.0, 4: 2.0})
    assert (backward.ready, backward.layers) == (21.0, pytest.approx({4: 1.0, 3: 3.0}))
    assert (weights.ready, weights.layers) == (26.0, {})
    on_host, *_ = traced_actions(records, marks, Offset(10.0, 0.0), on_stream=False)
    assert on_host.ready == 11.0


# -- clocks --------------------------------------------------------------------------------------


def read_clock(rank, world_size, skews, machines):
    """Returns the offset of a rank whose clock is ahead by its skew."""
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + skews[rank])
    with patch("megatrain.training.shared_clock.time", clock):
        return SharedClock(make_mesh(rank, data=world_size).world, machines[rank]).offset()


def test_clocks_of_other_machines_are_aligned(tmp_path):
    skews, machines = [3.0, 3.0, -1000.0, 250.0], ["a", "a", "b", "c"]
    offsets = run_ranks(read_clock, 4, skews, machines, folder=tmp_path)
    assert offsets[:2] == [(0.0, 0.0)] * 2
    for offset, skew in list(zip(offsets, skews, strict=True))[2:]:
        assert offset.error > 0
        assert offset.seconds == pytest.approx(skews[0] - skew, abs=offset.error)


def test_ranks_of_a_machine_share_an_offset(tmp_path):
    offsets = run_ranks(read_clock, 4, [0.0, 7.0, 7.0, 7.0], ["a", "b", "b", "b"], folder=tmp_path)
    assert offsets[1] == offsets[2] == offsets[3]
    assert offsets[1].seconds == pytest.approx(-7, abs=offsets[1].error)


# -- advice --------------------------------------------------------------------------------------


SLEEP, SLOW = 0.02, {4: 0.06}
"""Seconds that a block's forward takes, and its backward; block 4 is the slow one."""


def pretrain_sleeping(rank, world_size, raw):
    with sleeping(SLEEP, SLOW):
        pretrain(rank, world_size, raw)


def test_slow_layer_is_found_and_the_advice_gains_as_predicted(data, tmp_path):
    """Compares the fastest steps, because other load can only make a step slower.

    Load can also spoil an attempt, so there are several. Wrong advice is wrong in all of them.
    """
    before, after, said = [], [], []
    for attempt in range(10):
        seconds, advice = sleeping_run(data, tmp_path / f"before-{attempt}")
        before += seconds
        said.append(advice[0].text)
        if "block 4 alone takes" not in advice[0].text or advice[0].layers_per_stage != [4, 2]:
            continue
        seconds, further = sleeping_run(
            data, tmp_path / f"after-{attempt}", layers_per_stage=[4, 2]
        )
        after += seconds
        said.append(
            f"predicted {advice[0].gain:.3f}, measured {1 - min(after) / min(before):.3f}; then: "
            f"{further[0].text}"
        )
        if 2 / 3 * advice[0].gain <= 1 - min(after) / min(before) <= 4 / 3 * advice[
            0
        ].gain and not any(item.layers_per_stage for item in further):
            return
    pytest.fail("\n".join(said))


def sleeping_run(data, folder, **parallel):
    """Returns the seconds of the steps after the first, and the advice of the traces."""
    train = {"steps": 5, "micro_batch_size": 1}
    run_ranks(
        pretrain_sleeping,
        2,
        settings(data, folder, train=train, traced=[4, 5], pipeline=2, **parallel),
        folder=folder.parent,
    )
    return [line["seconds"] for line in lines(folder)[1:]], advise(
        profile_pipeline(read_traces(folder))
    )


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [20],
            "profile.steps=[20] must be two steps, [first, last], with 1 <= first <= last",
        ),
        (
            [22, 20],
            "profile.steps=[22, 20] must be two steps, [first, last], with 1 <= first <= last",
        ),
        (
            [0, 2],
            "profile.steps=[0, 2] must be two steps, [first, last], with 1 <= first <= last",
        ),
        (
            [28, 31],
            "profile.steps=[28, 31] must end by step 30, the last of the run",
        ),
    ],
)
def test_steps_to_trace(steps, message):
    with pytest.raises(ConfigError) as error:
        configuration.load(None, ["train.steps=30", f"profile.steps={steps}"])
    assert str(error.value) == message
    assert configuration.load(None, ["train.steps=30", "profile.steps=[30, 30]"]).profile.steps == [
        30,
        30,
    ]


def stages_of(counts, placement):
    """Returns the titles of each stage's layers, in the order of the model."""
    config = configuration.from_dict({"model": LLAMA, "parallel": {"layers_per_stage": counts}})
    specs = rank_specs(config, read_config(load_hf_config(LLAMA)), placement)
    return [
        [spec.title for spec in specs[rank][chunk]]
        for rank, chunk in map(placement.location, range(placement.stages))
    ]


def test_layers_per_stage():
    blocks = [f"block {number}" for number in range(6)]
    assert stages_of([5, 1], Placement(2)) == [["embedding", *blocks[:5]], [blocks[5], "head"]]
    assert stages_of([1, 1, 3, 1], Placement(2, 2, "v")) == [
        ["embedding", blocks[0]],
        [blocks[1]],
        blocks[2:5],
        [blocks[5], "head"],
    ]
    assert stages_of([6], Placement(1)) == [["embedding", *blocks, "head"]]


@pytest.mark.parametrize(
    ("counts", "rule"),
    [
        ([6], "has 1 numbers, but the model has 2 stages"),
        ([6, 0], "must have at least one block in each stage"),
        ([-1, 7], "must have at least one block in each stage"),
        ([3, 4], "has the sum 7, but num_hidden_layers=6"),
    ],
)
def test_invalid_layers_per_stage(counts, rule):
    with pytest.raises(ConfigError) as error:
        stages_of(counts, Placement(2))
    assert (
        str(error.value)
        == f"parallel.layers_per_stage={counts} {rule}; use [3, 3], or leave it out"
    )
