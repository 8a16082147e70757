"""The limit of the first losses after a resume rejects wrong weights only."""

from __future__ import annotations

import math
import random

import pytest

from megatrain.training.resume_check import RECENT_LOSSES, append_loss, highest_loss


def test_append_loss_keeps_the_last_losses():
    losses: tuple[float, ...] = ()
    for step in range(100):
        losses = append_loss(losses, float(step))
    assert losses == tuple(float(step) for step in range(100 - RECENT_LOSSES, 100))


def test_highest_loss():
    assert highest_loss([3.0], 1.0) == 5.0, "twice the tolerance with few losses"
    assert highest_loss([3.0] * 8, 1.0) == 4.0
    assert highest_loss([3.0, 3.2] * 8, 0.25) == pytest.approx(3.6), (
        "four standard deviations, if they exceed the tolerance"
    )


def test_losses_of_intact_checkpoints_pass():
    """Resumes 10,000 falling curves with noise at random steps."""
    dice = random.Random(3)
    for _ in range(10_000):
        start, floor, scale = (
            dice.uniform(4, 12),
            dice.uniform(0.5, 3),
            dice.choice([5, 50, 500, 5000]),
        )
        noise, at = dice.uniform(0, 0.6), dice.randint(1, 3000)

        def loss(step, start=start, floor=floor, scale=scale, noise=noise):
            return floor + (start - floor) * math.exp(-step / scale) + dice.gauss(0, noise)

        before = [loss(step) for step in range(max(1, at - RECENT_LOSSES + 1), at + 1)]
        assert max(loss(at + 1 + step) for step in range(3)) <= highest_loss(before, 1.0)


def test_losses_of_an_untrained_model_do_not_pass():
    dice = random.Random(4)
    for _ in range(1000):
        floor, noise, vocabulary = (
            dice.uniform(1.5, 5),
            dice.uniform(0, 0.3),
            dice.choice([32_000, 128_000]),
        )
        before = [dice.gauss(floor, noise) for _ in range(dice.randint(2, 32))]
        assert math.log(vocabulary) > highest_loss(before, 1.0)
