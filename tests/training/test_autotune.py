"""Schedule `auto` on real stages: the choice trains the same, and 1F1B is the fallback.

Times on a busy machine are unreliable, so no test depends on them. Tests set the measured times, or
let blocks sleep; a test that other load could fail is repeated.
"""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import yaml
from helpers.layout_runs import LLAMA, layout, reference, run_layout, tokens
from helpers.rank_pool import run_ranks
from helpers.reference_model import assert_equal
from helpers.sleeping_stage import sleeping
from helpers.training_runs import losses, microbatches, pretrain, write_tokens

from megatrain.config import loader as configuration
from megatrain.distributed.mesh import make_mesh
from megatrain.errors import ConfigError
from megatrain.models.config import load_hf_config, read_config
from megatrain.pipeline.registry import make_schedule
from megatrain.pipeline.schedule import Placement
from megatrain.pipeline.schedules import build_schedule
from megatrain.pipeline.simulator import Times, simulate
from megatrain.planner.list_scheduler import SchedulingRules, list_schedule
from megatrain.planner.schedule_search import candidate_of
from megatrain.training.autotune import _read
from megatrain.training.run_plan import dry_run
from megatrain.training.task import PretrainingTask

SLEEP, SLOW = 0.006, {1: 0.03}
"""Seconds that a block's forward takes, and its backward; block 1 is the slow one."""


@contextmanager
def measuring(seconds, counts):
    """Restricts the search to one candidate with this partition, and fixes its measured time."""

    def only(costs, *, ranks, microbatches, limit):
        numbers = random.Random(0)
        placement = Placement(ranks, 2, "v")
        times = Times(
            *([numbers.uniform(0.5, 2) for _ in range(placement.stages)] for _ in range(3)),
            send=0.1,
        )
        return [
            candidate_of(
                costs, list_schedule(placement, microbatches, times, SchedulingRules(ranks)), counts
            )
        ]

    with (
        patch("megatrain.training.autotune.find_candidates", only),
        patch("megatrain.training.autotune._promising", lambda base, plans, seconds: plans),
        patch("megatrain.training.calibrate.ScheduleProfiler.seconds", lambda *args: seconds),
    ):
        yield


def choice(folder):
    return json.loads((folder / "autotuned_schedule.json").read_text())


# -- what is settled on --------------------------------------------------------------------------


def train_measuring(rank, world_size, config, seconds, counts):
    with measuring(seconds, counts):
        return run_layout(rank, world_size, config)


@pytest.mark.parametrize(
    ("model", "settings", "counts"),
    [
        ("llama", {"pipeline": 2}, (2, 1, 1, 1)),
        ("tied", {"pipeline": 2, "tensor": 2}, (1, 1, 1, 2)),
        ("deep", {"pipeline": 4, "micro_batch_size": 1}, (1, 1, 1, 2, 1, 1, 1, 1)),
    ],
    ids=str,
)
def test_generated_schedule_trains_the_same(model, settings, counts, tmp_path):
    world = settings["pipeline"] * settings.get("tensor", 1)
    config = layout(model, {"schedule": "auto", **settings}, **{"run.output_dir": str(tmp_path)})
    assert_equal(
        run_ranks(train_measuring, world, config, 0.0, counts, folder=tmp_path),
        reference(model),
        losses=2e-6,
    )
    assert (choice(tmp_path)["layers_per_stage"], choice(tmp_path)["schedule"]) == (
        [*counts],
        str(tmp_path / "autotuned_schedule.csv"),
    )
    assert "a schedule built for these times with" in choice(tmp_path)["reason"]


def test_candidate_slower_than_1f1b_is_not_chosen(tmp_path):
    """The model is partitioned as without auto, and the log line lists what was measured."""
    config = layout(
        "llama", {"schedule": "auto", "pipeline": 2}, **{"run.output_dir": str(tmp_path)}
    )
    assert_equal(
        run_ranks(train_measuring, 2, config, 1e6, (1, 2, 1, 1), folder=tmp_path),
        reference("llama"),
        losses=2e-6,
    )
    kept = choice(tmp_path)
    assert (kept["schedule"], kept["layers_per_stage"]) == ("1f1b", [3, 2])
    assert kept["reason"].startswith("1f1b with [3, 2] blocks by stage: a step takes ")
    assert (
        "; a schedule built for these times with [1, 2, 1, 1] blocks by stage in a V took "
        "1,000,000,000 ms (" in kept["reason"]
    )


def train_sleeping(rank, world_size, config):
    """Trains with sleeping blocks and takes the candidate that is predicted to be fastest."""
    with (
        sleeping(SLEEP, SLOW),
        patch("megatrain.training.calibrate.ScheduleProfiler.seconds", lambda *args: 0.0),
    ):
        return run_layout(rank, world_size, config)


@pytest.mark.parametrize(("model", "ranks"), [("llama", 2), ("deep", 4)])
def test_partition_avoids_a_slow_layer(model, ranks, tmp_path):
    """Requires that, by sleeps alone, the choice is faster than 1F1B on the partition by cost.

    Noise can only hide that, so the test is repeated.
    """
    config = layout(
        model, {"schedule": "auto", "pipeline": ranks}, **{"run.output_dir": str(tmp_path)}
    )
    ratios = []
    for _ in range(10):
        assert_equal(
            run_ranks(train_sleeping, ranks, config, folder=tmp_path), reference(model), losses=2e-6
        )
        kept = choice(tmp_path)
        schedule = make_schedule(
            kept["schedule"], ranks=ranks, microbatches=4, virtual_stages=kept["virtual"]
        )
        base = build_schedule("1f1b", ranks, 4)
        ratios.append(asleep(schedule, kept["layers_per_stage"]) / asleep(base, BY_COST[ranks]))
        if ratios[-1] < 0.9:
            break
    assert ratios[-1] < 0.9, ratios


BY_COST = {2: [3, 2], 4: [3, 2, 2, 2]}


def asleep(schedule, counts):
    """Returns the simulated seconds of a step whose blocks only sleep."""
    blocks = iter([SLOW.get(block, SLEEP) for block in range(sum(counts))])
    stages = [sum(next(blocks) for _ in range(count)) for count in counts]
    return simulate(schedule, Times(stages, stages, [0.0] * len(stages))).makespan


# -- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def settings(data, output, *, exit_after_step=None, **parallel):
    return {
        "run": {"output_dir": str(output)},
        "model": LLAMA,
        "data": {"train": str(data), "sequence_length": 16},
        "parallel": {"pipeline": 2, "schedule": "auto", **parallel},
        "train": {
            "steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "exit_after_step": exit_after_step,
        },
    }


def pretrain_measuring(rank, world_size, raw, counts=None):
    """Trains with one candidate; without one, a measurement fails."""
    with measuring(0.0, counts) if counts else patch("megatrain.training.autotune._measure", None):
        pretrain(rank, world_size, raw)


def test_resumed_run_keeps_its_choice_and_names_it_in_config_yaml(data, tmp_path):
    run_ranks(
        pretrain_measuring,
        2,
        settings(data, tmp_path / "auto", exit_after_step=2),
        (2, 1, 1, 1),
        folder=tmp_path,
    )
    run_ranks(pretrain_measuring, 2, settings(data, tmp_path / "auto"), folder=tmp_path)
    resolved = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    assert {
        key: resolved["parallel"][key] for key in ("schedule", "virtual", "layers_per_stage")
    } == {
        "schedule": str(tmp_path / "auto" / "autotuned_schedule.csv"),
        "virtual": None,
        "layers_per_stage": [2, 1, 1, 1],
    }
    resolved["run"]["output_dir"] = str(tmp_path / "named")
    run_ranks(pretrain_measuring, 2, resolved, folder=tmp_path)
    assert losses(tmp_path / "auto") == losses(tmp_path / "named")
    assert len(losses(tmp_path / "auto")) == 4


@pytest.mark.parametrize(
    ("name", "conditions"),
    [("autotuned_schedule.json", "conditions"), ("schedule.json", "asked")],
    ids=["current names", "names of earlier versions"],
)
def test_choice_of_an_earlier_attempt_is_read_if_its_conditions_are_the_same(
    name, conditions, tmp_path
):
    config = configuration.from_dict(settings("none", tmp_path))
    kept = {
        "schedule": "zb-v",
        "virtual": None,
        "layers_per_stage": [1, 1, 1, 2],
        conditions: {"data": 1, "micro_batch_size": 2},
    }
    (tmp_path / name).write_text(json.dumps(kept))
    assert _read(config, kept[conditions]).schedule == build_schedule("zb-v", 2, 4)
    assert _read(config, {"data": 1, "micro_batch_size": 4}) is None
    for damaged in (
        "",
        "[]",
        "{}",
        json.dumps(kept | {"schedule": "none"}),
        json.dumps(kept | {"layers_per_stage": ["x"]}),
    ):
        (tmp_path / name).write_text(damaged)
        assert _read(config, kept[conditions]) is None


# -- memory --------------------------------------------------------------------------------------


def measure_bytes(rank, world_size, config):
    from megatrain.optim.null import NullOptimizer
    from megatrain.training.calibrate import layer_bytes
    from megatrain.training.step_runner import StepRunner
    from megatrain.training.trace_recorder import local_layers

    runner = StepRunner(
        config,
        read_config(load_hf_config(config.model)),
        make_mesh(rank),
        torch.device("cpu"),
        optimizer=NullOptimizer,
    )
    with layer_bytes(local_layers(runner), 10.0) as sizes:
        runner.train_step(1, microbatches(tokens(1), 2, runner.mesh.data))
    return [(*size,) for size in sizes]


def test_bytes_of_layers(tmp_path):
    """Recomputed blocks keep their inputs: 16 x 2 x 32 numbers.

    Weights are 67 x 32, and a block's matrices and two norms.
    """
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    for dtype, width in (("fp32", 4), ("bf16", 2)):
        config = layout("llama", {"recompute": "full"}, **{"train.dtype": dtype})
        (sizes,) = run_ranks(measure_bytes, 1, config, folder=tmp_path)
        assert sizes[0] == (0, (10.0 + width) * 67 * 32, 16 * 2 * 8), "the tokens, int64"
        assert sizes[1:6] == [
            (place, (10.0 + width) * block, 16 * 2 * 32 * width) for place in range(1, 6)
        ]
        assert sizes[6][1] == (10.0 + width) * (67 * 32 + 32)
        assert sizes[6][2] == 16 * 2 * ((67 + 2 * 32) * width + 4), (
            "the norm's input, output and, in fp32, its scale; the logits; no weight"
        )
        (kept,) = run_ranks(
            measure_bytes, 1, layout("llama", {}, **{"train.dtype": dtype}), folder=tmp_path
        )
        assert [kept[1][2] - size[2] for size in kept[2:6]] == [2 * 16 * 8 * width] * 4, (
            "the rotations that all blocks share count once"
        )


def settle(rank, world_size, config):
    """Returns the memory limit that the search gets."""
    limits = []

    def none(costs, *, ranks, microbatches, limit):
        limits.append(limit)
        return []

    with patch("megatrain.training.autotune.find_candidates", none):
        run_layout(rank, world_size, config)
    return limits


def test_memory_limit(tmp_path):
    def config(**parallel):
        return layout(
            "llama",
            {"pipeline": 2, "schedule": "auto", **parallel},
            **{"run.output_dir": str(tmp_path)},
        )

    assert run_ranks(settle, 2, config(autotune_memory_gib=0.5), folder=tmp_path) == [[2**29], []]
    (own,), _ = run_ranks(settle, 2, config(), folder=tmp_path)
    assert 2**20 < own < 2**50
    with pytest.raises(
        AssertionError,
        match=r"autotune_memory_gib=1e-06 must allow some schedule; 1f1b needs 0\.00",
    ):
        run_ranks(run_layout, 2, config(autotune_memory_gib=1e-6), folder=tmp_path)


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["parallel.virtual=2"],
            "parallel.virtual=2 has no effect with parallel.schedule=auto, which chooses it",
        ),
        (
            ["parallel.layers_per_stage=[1,2]"],
            "parallel.layers_per_stage=[1, 2] has no effect with parallel.schedule=auto, "
            "which chooses it",
        ),
        (
            ["parallel.schedule=zb-v", "parallel.autotune_memory_gib=3"],
            "parallel.autotune_memory_gib=3.0 has no effect with parallel.schedule=zb-v; "
            "set parallel.schedule=auto to use it",
        ),
    ],
)
def test_settings_that_auto_does_not_support(words, message):
    with pytest.raises(ConfigError) as error:
        configuration.load(None, ["train.steps=1", "parallel.schedule=auto", *words])
    assert str(error.value) == message


def test_dry_run_announces_measurements(data, tmp_path):
    text = dry_run(configuration.from_dict(settings(data, tmp_path)), PretrainingTask())
    assert "measured before the first step; the plan shows 1f1b" in text
    assert "            0  4: embedding ... block 2" in text
    assert "measured" not in dry_run(
        configuration.from_dict(settings(data, tmp_path, pipeline=1)), PretrainingTask()
    )
