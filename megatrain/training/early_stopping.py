"""Early stopping: a run ends once an evaluation's figure has stopped improving."""

from __future__ import annotations

from collections.abc import Mapping

from megatrain.errors import ConfigError

_SMALLER_IS_BETTER = ("valid_loss", "valid_mse", "valid_mae")


class EarlyStopping:
    """Evaluations so far and whether it is time to stop; the same on every rank.

    Attributes:
        best_step, best: of the best evaluation; None before the first.
        since: evaluations since the best.
    """

    def __init__(self, *, patience: int, metric: str) -> None:
        self.patience, self.metric = patience, metric
        self.best_step: int | None = None
        self.best: float | None = None
        self.since = 0

    def add(self, step: int, figures: Mapping[str, object]) -> bool:
        """Take in an evaluation; returns whether it is the best so far. A figure that is no number never is."""
        value = figures.get(self.metric)
        if not isinstance(value, int | float):
            known = ", ".join(sorted(name for name in figures if name.startswith("valid_")))
            raise ConfigError(
                "eval.early_stopping_metric",
                self.metric,
                "is not what this run measures",
                f"use one of {known}",
            )
        if self._is_better(float(value)):
            self.best_step, self.best, self.since = step, float(value), 0
            return True
        self.since += 1
        return False

    @property
    def is_over(self) -> bool:
        return self.since >= self.patience

    def words(self) -> str:
        """Of a stop, for the user."""
        return f"stopped early: {self.metric} has not improved in {self.since} evaluations; its best is {self.best:.4f} after step {self.best_step}"

    def _is_better(self, value: float) -> bool:
        if value != value:
            return False
        if self.best is None:
            return True
        return value < self.best if self.metric in _SMALLER_IS_BETTER else value > self.best
