"""Detection of loss spikes, and the choice of the checkpoint to go back to."""

from __future__ import annotations

import math
import random

import pytest

from megatrain.checkpoint import manifest, retention
from megatrain.checkpoint.train_state import TrainState
from megatrain.config.schema import StabilityConfig
from megatrain.training import loss_spikes
from megatrain.training.loss_spikes import (
    first_step_to_undo,
    is_noticed,
    spike_since,
    spike_threshold,
)


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def test_threshold_is_the_median_plus_robust_deviations():
    config = StabilityConfig(spike_window=8, spike_patience=2)
    losses = (9.0, 3.0, 3.1, 2.9, 3.0, 3.2, 2.8, 3.1, 3.0)
    limit = spike_threshold(losses, config)
    assert limit.median == 3.0
    assert limit.deviation == pytest.approx(1.4826 * 0.1)
    assert limit.loss == pytest.approx(3.0 + 7 * 1.4826 * 0.1)
    assert spike_threshold(losses[:7], config) is None, "too few to judge by"
    assert spike_threshold(losses, StabilityConfig(on_loss_spike="off", spike_window=8)) is None
    assert spike_threshold((2.0,) * 8, config).loss == pytest.approx(2.0 + 7 * 0.02), (
        "losses that do not vary"
    )


def follow(losses, config):
    """Returns the steps at which a spike is noticed, each with the first step of the spike."""
    progress, noticed = TrainState(0, 0, 0), []
    for loss in losses:
        since = spike_since(progress, loss, spike_threshold(progress.losses, config))
        kept = (
            (*progress.losses, loss)[-config.spike_window :]
            if math.isfinite(loss)
            else progress.losses
        )
        progress = progress._replace(step=progress.step + 1, losses=kept, spike_since=since)
        noticed += [(progress.step, since)] if is_noticed(progress, config) else []
    return noticed


def test_spike_is_noticed_once_and_outliers_are_ignored():
    config, calm = StabilityConfig(spike_window=8, spike_patience=3), [3.0, 3.1, 2.9] * 10
    assert follow([*calm, 9.0, 9.0, 9.0, 9.0, *calm], config) == [(33, 31)]
    assert follow([*calm, 9.0, 9.0, *calm, 9.0, *calm], config) == []
    assert follow([*calm, 9.0, math.nan, 9.0, *calm], config) == [(33, 31)], "a NaN does not end it"
    assert follow([*calm, math.nan, 9.0, 9.0, *calm], config) == [], "and does not start one"


def test_smooth_runs_have_no_spike_and_a_real_one_is_found():
    dice, config = random.Random(5), StabilityConfig()
    for _ in range(60):
        start, floor, scale, noise = (
            dice.uniform(4, 12),
            dice.uniform(0.5, 3),
            dice.choice([50, 500, 5000]),
            dice.uniform(0.01, 0.5),
        )
        at = dice.randint(100, 3000)
        losses = [
            floor + (start - floor) * math.exp(-(at + step) / scale) + dice.gauss(0, noise)
            for step in range(250)
        ]
        assert follow(losses, config) == []
        losses[200:230] = [loss + 4 + 10 * noise for loss in losses[200:230]]
        assert follow(losses, config)[:1] == [(203, 201)]


def test_first_step_to_undo():
    rollback = StabilityConfig(on_loss_spike="rollback")
    assert first_step_to_undo(TrainState(12, 0, 0, spike_since=10), rollback) == 10
    assert first_step_to_undo(TrainState(13, 0, 0, spike_since=10), rollback) == 0, "once"
    assert first_step_to_undo(TrainState(12, 0, 0, bad_steps=5), rollback) == 8
    assert first_step_to_undo(TrainState(12, 0, 0, bad_steps=4), rollback) == 0
    assert (
        first_step_to_undo(
            TrainState(12, 0, 0, bad_steps=5, spike_since=10), StabilityConfig(on_loss_spike="warn")
        )
        == 0
    )


def test_rollback_target(tmp_path):
    for step in (2, 4, 6, 8, 10):
        path = tmp_path / "checkpoints" / f".writing-step-{step:08d}"
        path.mkdir(parents=True)
        (path / "x").write_text("x")
        manifest.commit(path, checkpoint(tmp_path, step), [manifest.make_record(path, path / "x")])
    (checkpoint(tmp_path, 8) / "x").write_text("longer")

    def found(since, own=lambda step: True):
        target = loss_spikes._find_target(tmp_path, since=since, is_own=own, hashes=False)
        return target.path and retention.step_number(target.path), target.times, target.problems

    assert found(12) == (10, 0, ())
    assert found(11) == (6, 0, ("step-00000008 has 6 bytes in x instead of 1",)), (
        "that of 10 shows in 11"
    )
    assert found(7) == (4, 0, ())
    assert found(3) == (None, 0, ())
    assert found(12, lambda step: step <= 4) == (4, 0, ()), "later ones are of another run"
    (tmp_path / loss_spikes.FILE_NAME).write_text(
        '{"step": 6, "first": 48, "last": 79}\n{"step": 6, "first": 80, "last": 87}\n'
    )
    assert found(7) == (6, 2, ()), "one that was gone back to is good"
