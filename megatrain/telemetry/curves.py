"""Figures over steps, read from a metrics.jsonl of any length into a bounded number of pieces.

A curve begins with one piece a step. When it has too many, pieces become twice as long: neighbours are put together. Each piece
knows its lowest and its highest value and where they were, so that a spike of one step in a million stays visible, and the mean
of all its values. What has been read is not kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatrain import files

PIECES = 800
"""Of a curve, at most: about one a pixel."""
CHUNK = 1 << 15
"""Lines that are read before they become pieces."""
_MOST_CURVES = 100

_PIECE = np.dtype(
    [
        ("place", "i8"),
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
    """One figure over steps.

    Attributes:
        count, total: of its values.
        last: the point of the highest step; of one step that is there twice, the later.
    """

    def __init__(self, pieces: int = PIECES) -> None:
        self.most, self.length = pieces, 1
        self.count, self.total = 0, 0.0
        self.last = Point(-1, np.nan)
        self._pieces = np.zeros(0, _PIECE)

    def add(self, steps: list[int], values: list[float]) -> None:
        new = np.zeros(len(steps), _PIECE)
        new["count"] = 1
        new["steps"] = new["low_at"] = new["high_at"] = steps
        new["sum"] = new["low"] = new["high"] = values
        self.count, self.total = self.count + len(steps), self.total + float(new["sum"].sum())
        end = len(steps) - 1 - int(np.argmax(new["steps"][::-1]))
        if steps[end] >= self.last.step:
            self.last = Point(steps[end], float(values[end]))
        new["place"] = new["low_at"] // self.length
        self._pieces = _together(np.concatenate([self._pieces, new]))
        while len(self._pieces) > self.most:
            self.length *= 2
            self._pieces["place"] //= 2
            self._pieces = _together(self._pieces)

    @property
    def lowest(self) -> Point:
        at = self._pieces[np.argmin(self._pieces["low"])]
        return Point(int(at["low_at"]), float(at["low"]))

    @property
    def highest(self) -> Point:
        at = self._pieces[np.argmax(self._pieces["high"])]
        return Point(int(at["high_at"]), float(at["high"]))

    @property
    def mean(self) -> float:
        return self.total / self.count

    def points(self) -> list[Point]:
        """The lowest and the highest of each piece, in the order of steps: every value, where pieces are one step long."""
        found: list[Point] = []
        for piece in self._pieces:
            ends = {
                Point(int(piece["low_at"]), float(piece["low"])),
                Point(int(piece["high_at"]), float(piece["high"])),
            }
            found += sorted(ends)
        return found

    def smooth(self, share: float = 0.04) -> list[Point]:
        """The means of windows around each piece, `share` of all pieces wide."""
        half = max(1, round(share * len(self._pieces) / 2))
        sums = [
            np.concatenate([[0], np.cumsum(self._pieces[name], dtype=np.float64)])
            for name in ("sum", "count", "steps")
        ]
        here = np.arange(len(self._pieces))
        first, end = np.maximum(here - half, 0), np.minimum(here + half + 1, len(here))
        value, count, _ = (total[end] - total[first] for total in sums)
        steps = self._pieces["steps"] / self._pieces["count"]
        return [
            Point(float(step), float(mean)) for step, mean in zip(steps, value / count, strict=True)
        ]


def _together(pieces: Array) -> Array:
    """One piece for each place, in their order."""
    by_low = pieces[np.lexsort((pieces["low"], pieces["place"]))]
    firsts = np.flatnonzero(np.concatenate([[True], by_low["place"][1:] != by_low["place"][:-1]]))
    if len(firsts) == len(by_low):
        return by_low
    result = by_low[firsts].copy()  # the lowest of each place stands first
    by_high = pieces[np.lexsort((-pieces["high"], pieces["place"]))][firsts]
    result["high"], result["high_at"] = by_high["high"], by_high["high_at"]
    for name in ("count", "sum", "steps"):
        result[name] = np.add.reduceat(by_low[name], firsts)
    return result


def read_curves(path: Path, *, pieces: int = PIECES) -> dict[str, Curve]:
    """A curve for each figure of a metrics.jsonl, by name; lines that a kill tore are read over."""
    curves: dict[str, Curve] = {}
    waiting: dict[str, tuple[list[int], list[float]]] = {}

    def take_in() -> None:
        for name, (steps, values) in waiting.items():
            curves.setdefault(name, Curve(pieces)).add(steps, values)
        waiting.clear()

    for number, line in enumerate(files.read(path), start=1):
        step = line.get("step")
        if type(step) is not int:
            continue
        for name, value in line.items():
            if type(value) in (float, int, bool) and name != "step" and abs(value) < float("inf"):
                if (
                    name not in waiting
                    and name not in curves
                    and len(waiting) + len(curves) >= _MOST_CURVES
                ):
                    continue
                steps, values = waiting.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
        if number % CHUNK == 0:
            take_in()
    take_in()
    return curves
