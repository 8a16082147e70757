"""Reads metrics over steps from a metrics.jsonl of any length into a bounded number of buckets.

A curve starts with one bucket per step. When it has too many, neighbouring buckets are merged, and
buckets double in length. Each bucket has the mean of its values, and the lowest and highest with
their steps: a spike of one step in a million stays visible. The values themselves are not kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatrain import files

MAX_BUCKETS = 800
"""Buckets per curve, about one per pixel."""
CHUNK = 1 << 15
"""Lines that are read before they are merged into buckets."""
_MAX_CURVES = 100
_RENAMED = {"save_stall_seconds": "checkpoint_blocking_seconds"}
"""Metrics of older versions and their names today."""

_BUCKET = np.dtype(
    [
        ("index", "i8"),
        ("count", "i8"),
        ("sum", "f8"),
        ("steps", "f8"),
        ("low", "f8"),
        ("low_at", "i8"),
        ("high", "f8"),
        ("high_at", "i8"),
    ]
)

Array = np.ndarray[Any, np.dtype[Any]]


class Point(NamedTuple):
    step: float
    value: float


class Curve:
    """One metric over steps.

    Attributes:
        count, total: number and sum of the values.
        last: the point of the highest step; if that step occurs twice, the later one.
    """

    def __init__(self, buckets: int = MAX_BUCKETS) -> None:
        self.max_buckets = buckets
        self.length = 1
        """Steps per bucket."""
        self.count = 0
        self.total = 0.0
        self.last = Point(-1, np.nan)
        self._buckets = np.zeros(0, _BUCKET)

    def add(self, steps: list[int], values: list[float]) -> None:
        """Adds values; steps may come in any order."""
        new = np.zeros(len(steps), _BUCKET)
        new["count"] = 1
        new["steps"] = new["low_at"] = new["high_at"] = steps
        new["sum"] = new["low"] = new["high"] = values
        self.count += len(steps)
        self.total += float(new["sum"].sum())
        end = len(steps) - 1 - int(np.argmax(new["steps"][::-1]))
        if steps[end] >= self.last.step:
            self.last = Point(steps[end], float(values[end]))
        new["index"] = new["low_at"] // self.length
        self._buckets = _merge(np.concatenate([self._buckets, new]))
        while len(self._buckets) > self.max_buckets:
            self.length *= 2
            self._buckets["index"] //= 2
            self._buckets = _merge(self._buckets)

    @property
    def lowest(self) -> Point:
        """The point of the lowest value."""
        bucket = self._buckets[np.argmin(self._buckets["low"])]
        return Point(int(bucket["low_at"]), float(bucket["low"]))

    @property
    def highest(self) -> Point:
        """The point of the highest value."""
        bucket = self._buckets[np.argmax(self._buckets["high"])]
        return Point(int(bucket["high_at"]), float(bucket["high"]))

    @property
    def mean(self) -> float:
        """Mean of all values."""
        return self.total / self.count

    def points(self) -> list[Point]:
        """Returns the lowest and highest point of each bucket; all points of a short curve."""
        points: list[Point] = []
        for bucket in self._buckets:
            ends = {
                Point(int(bucket["low_at"]), float(bucket["low"])),
                Point(int(bucket["high_at"]), float(bucket["high"])),
            }
            points += sorted(ends)
        return points

    def smooth(self, share: float = 0.04) -> list[Point]:
        """Returns the means of windows around each bucket, `share` of all buckets wide."""
        half = max(1, round(share * len(self._buckets) / 2))
        value_sums, count_sums = (
            np.concatenate([[0], np.cumsum(self._buckets[name], dtype=np.float64)])
            for name in ("sum", "count")
        )
        indices = np.arange(len(self._buckets))
        first = np.maximum(indices - half, 0)
        end = np.minimum(indices + half + 1, len(indices))
        means = (value_sums[end] - value_sums[first]) / (count_sums[end] - count_sums[first])
        steps = self._buckets["steps"] / self._buckets["count"]
        return [Point(float(step), float(mean)) for step, mean in zip(steps, means, strict=True)]


def _merge(buckets: Array) -> Array:
    """Returns one bucket for each index, by index."""
    by_low = buckets[np.lexsort((buckets["low"], buckets["index"]))]
    firsts = np.flatnonzero(np.concatenate([[True], by_low["index"][1:] != by_low["index"][:-1]]))
    if len(firsts) == len(by_low):
        return by_low
    result = by_low[firsts].copy()  # the first of each index has the lowest value
    by_high = buckets[np.lexsort((-buckets["high"], buckets["index"]))][firsts]
    result["high"], result["high_at"] = by_high["high"], by_high["high_at"]
    for name in ("count", "sum", "steps"):
        result[name] = np.add.reduceat(by_low[name], firsts)
    return result


def read_curves(path: Path, *, buckets: int = MAX_BUCKETS) -> dict[str, Curve]:
    """Returns a curve for each numeric metric of a metrics.jsonl; skips truncated lines."""
    curves: dict[str, Curve] = {}
    pending: dict[str, tuple[list[int], list[float]]] = {}

    def flush() -> None:
        for name, (steps, values) in pending.items():
            curves.setdefault(name, Curve(buckets)).add(steps, values)
        pending.clear()

    for number, line in enumerate(files.read(path), start=1):
        step = line.pop("step", None)
        if type(step) is not int:
            continue
        for key, value in line.items():
            if type(value) not in (float, int, bool) or not abs(value) < float("inf"):
                continue
            name = _RENAMED.get(key, key)
            is_known = name in pending or name in curves
            if is_known or len(pending) + len(curves) < _MAX_CURVES:
                steps, values = pending.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
        if number % CHUNK == 0:
            flush()
    flush()
    return curves
