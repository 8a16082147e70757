"""The rate of each schedule at selected steps, computed from its formula."""

import math

import pytest

from megatrain.config.schema import LrScheduleConfig
from megatrain.optim.lr_schedule import learning_rate

PEAK, LEAST, WARMUP, STEPS = 4.0, 1.0, 10, 110


def rate(name, step, **settings):
    schedule = LrScheduleConfig(name=name, **{"warmup_steps": WARMUP, "min_lr": LEAST} | settings)
    return learning_rate(step, peak=PEAK, schedule=schedule, steps=STEPS)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_warm_up_is_linear_from_zero_to_the_peak(name):
    assert [rate(name, step) for step in (1, 5, 10)] == [0.4, 2.0, 4.0]


VALUES = {
    # a quarter, half and all of the 100 steps after the warm-up
    "cosine": {35: 1 + 1.5 * (1 + math.sqrt(0.5)), 60: 2.5, 110: 1.0},
    "linear": {35: 3.25, 60: 2.5, 110: 1.0},
    "constant": {11: 4.0, 60: 4.0, 110: 4.0},
    # at the peak for 80 steps, then down in 20
    "wsd": {11: 4.0, 90: 4.0, 100: 2.5, 110: 1.0},
    "inverse_sqrt": {40: 2.0, 90: 4 / 3, 160: 1.0, 1000: 1.0},
}


@pytest.mark.parametrize(
    ("name", "step"), [(name, step) for name, values in VALUES.items() for step in values]
)
def test_rates_after_the_warm_up(name, step):
    assert rate(name, step) == pytest.approx(VALUES[name][step], rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_rate_is_constant_after_decay_steps(name):
    assert [rate(name, step, decay_steps=60) for step in (60, 61, 110)] == pytest.approx(
        [LEAST] * 3
    )
    assert rate(name, 59, decay_steps=60) > LEAST


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_wsd_with_stable_fractions_0_and_1(fraction):
    assert rate("wsd", 60, stable_fraction=fraction) == (2.5 if fraction == 0.0 else PEAK)
    assert rate("wsd", 110, stable_fraction=fraction) == (LEAST if fraction == 0.0 else PEAK)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_without_warm_up_the_first_rate_is_near_the_peak(name):
    first = rate(name, 1, warmup_steps=0)
    assert PEAK * 0.99 < first <= PEAK


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "inverse_sqrt"])
def test_the_rate_does_not_rise_after_the_warm_up(name):
    rates = [rate(name, step) for step in range(WARMUP, STEPS + 20)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) >= LEAST
