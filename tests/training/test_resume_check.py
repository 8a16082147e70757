"""What a resume's first losses are held to: honest ones pass, those of wrong weights or moments do not."""

from __future__ import annotations

import math
import random

import pytest

from megatrain.training.resume_check import REMEMBERED, highest_loss, remember_loss


def test_keeps_the_last_losses():
    losses: tuple[float, ...] = ()
    for step in range(100):
        losses = remember_loss(losses, float(step))
    assert losses == tuple(float(step) for step in range(100 - REMEMBERED, 100))


def test_the_rule():
    assert highest_loss([3.0], 1.0) == 5.0, "twice the margin where little is known"
    assert highest_loss([3.0] * 8, 1.0) == 4.0
    assert highest_loss([3.0, 3.2] * 8, 0.25) == pytest.approx(3.6), (
        "four standard deviations where losses vary more than the margin"
    )


def test_honest_runs_pass():
    """Falling curves with noise, short and long: 10,000 resumes at random moments."""
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

        before = [loss(step) for step in range(max(1, at - REMEMBERED + 1), at + 1)]
        assert max(loss(at + 1 + step) for step in range(3)) <= highest_loss(before, 1.0)


def test_an_untrained_models_loss_does_not():
    dice = random.Random(4)
    for _ in range(1000):
        floor, noise, vocabulary = (
            dice.uniform(1.5, 5),
            dice.uniform(0, 0.3),
            dice.choice([32_000, 128_000]),
        )
        before = [dice.gauss(floor, noise) for _ in range(dice.randint(2, 32))]
        assert math.log(vocabulary) > highest_loss(before, 1.0)
