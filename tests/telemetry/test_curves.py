"""Curves keep every spike of a run of any length in few buckets."""

import json

import numpy as np
import pytest

from megatrain.telemetry import curves
from megatrain.telemetry.curves import Curve, Point, read_curves


def test_a_short_curve_has_all_points():
    curve = Curve()
    curve.add([1, 2], [5.0, 4.0])
    curve.add([3], [6.0])
    assert curve.points() == [(1, 5.0), (2, 4.0), (3, 6.0)]
    assert (curve.count, curve.total, curve.mean, curve.last, curve.lowest, curve.highest) == (
        3,
        15.0,
        5.0,
        (3, 6.0),
        (2, 4.0),
        (3, 6.0),
    )


@pytest.mark.parametrize("chunk", [1, 7, 1000, 5000])
def test_a_long_curve_keeps_each_spike_and_the_means(chunk):
    values = np.random.default_rng(0).normal(size=5000)
    values[1234], values[4321] = 50.0, -60.0
    curve = Curve(buckets=64)
    for first in range(0, 5000, chunk):
        curve.add(
            list(range(first, min(first + chunk, 5000))), values[first : first + chunk].tolist()
        )
    points = curve.points()
    assert 64 <= len(points) <= 128
    assert Point(1234, 50.0) in points
    assert Point(4321, -60.0) in points
    assert all(values[int(step)] == value for step, value in points)
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert curve.total == pytest.approx(values.sum())
    assert curve.last == (4999, values[-1])
    assert (curve.lowest, curve.highest) == ((4321, -60.0), (1234, 50.0))


def test_smooth_is_the_mean_around_each_bucket():
    curve = Curve()
    curve.add(list(range(1, 101)), [float(step % 2) for step in range(1, 101)])
    smooth = curve.smooth(share=0.1)  # 5 to each side
    assert [point.step for point in smooth] == list(range(1, 101))
    assert all(point.value == pytest.approx(0.5, abs=0.05) for point in smooth[5:-5])


def test_the_order_of_steps_does_not_matter():
    steps = np.random.default_rng(1).permutation(3000).tolist()
    ordered, mixed = Curve(buckets=50), Curve(buckets=50)
    ordered.add(sorted(steps), [float(step) for step in sorted(steps)])
    for step in steps:
        mixed.add([step], [float(step)])
    assert mixed.points() == ordered.points()
    assert mixed.last == (2999, 2999.0)


def test_only_finite_numbers_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "CHUNK", 2)
    lines = [
        {"step": 0, "valid_loss": 4.0},
        {"step": 1, "loss": None, "skipped": True, "mfu": None, "phase": "x"},
        {"step": 2, "loss": 3.0, "skipped": False},
        {"loss": 9.0},
        {"step": "3", "loss": 9.0},
        {"step": 3, "loss": 2.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "loss": 1')
    found = read_curves(path)
    assert {name: curve.points() for name, curve in found.items()} == {
        "valid_loss": [(0, 4.0)],
        "skipped": [(1, 1.0), (2, 0.0)],
        "loss": [(2, 3.0), (3, 2.0)],
    }
    assert found["skipped"].total == 1


def test_the_number_of_curves_is_limited(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, f"name {step}": 1.0}) + "\n" for step in range(300))
    )
    assert len(read_curves(path)) == 100
    assert read_curves(tmp_path / "none") == {}
