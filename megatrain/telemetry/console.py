"""Console lines of a training run: its header and one line per logged step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class StepLine(NamedTuple):
    """Values of a step's line; rates are totals of all ranks."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    flops_per_second: float
    seconds_per_step: float


def header(
    *,
    name: str,
    model: str,
    num_parameters: int,
    layout: str,
    device: str,
    dtype: str,
    tokens_per_step: int,
    steps: int | None,
    epochs: int | None = None,
) -> str:
    """Returns the first lines of a run: model, layout and number of steps."""
    budget = f"steps of {tokens_per_step:,} tokens"
    if epochs is not None:
        budget = f"{epochs} epoch{'s' if epochs > 1 else ''}, in {budget}"
    if steps is not None:
        total = short_number(steps * tokens_per_step)
        budget = f"{steps} steps x {tokens_per_step:,} tokens = {total} tokens"
    return "\n".join(
        [
            f"{name}: {model}, {short_number(num_parameters)} parameters "
            f"({num_parameters:,}), {dtype}",
            f"  layout  {layout} on {device}",
            f"  work    {budget}",
        ]
    )


def step_line(step: StepLine) -> str:
    """Returns the line of a step; columns keep their width from step to step."""
    width = len(str(step.steps))
    left = (step.steps - step.step) * step.seconds_per_step
    return (
        f"step {step.step:>{width}}/{step.steps}  loss {step.loss:7.4f}  "
        f"grad {step.grad_norm:7.3f}  lr {step.lr:.2e}  "
        f"{short_number(step.tokens_per_second):>6} tok/s  "
        f"{_flops(step.flops_per_second):>12}  {duration(left)} left"
    )


def evaluation_line(
    *, step: int, steps: int, loss: float, measured: Mapping[str, float] | None = None
) -> str:
    """Returns the line of an evaluation after `step`."""
    metrics = _format_metrics(measured or {})
    return f"step {step:>{len(str(steps))}}/{steps}  validation loss {loss:.4f}{metrics}"


def _format_metrics(metrics: Mapping[str, float]) -> str:
    return "".join(
        f"  {name.removeprefix('valid_')} {metrics[name]:.4f}"
        for name in _CONSOLE_METRICS
        if name in metrics
    )


_CONSOLE_METRICS = (
    "valid_accuracy",
    "valid_f1_macro",
    "valid_mse",
    "valid_r2",
    "valid_rewards/margins",
    "valid_rewards/accuracy",
)
"""Metrics of evaluations on the console; metrics.jsonl has all."""


def short_number(value: float) -> str:
    """Returns a number with three digits and a unit: 1.24M, 80.3B, 950."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:  # 999.5k is rounded to 1.00M
            return f"{_three_digits(value / size)}{unit}"
    return _three_digits(value)


def duration(seconds: float) -> str:
    """Returns a duration in its two largest units: 2d03h, 4h05m, 3m20s, 12s."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minutes}m{second:02d}s" if minutes else f"{second}s"


def _flops(rate: float) -> str:
    return (
        f"{_three_digits(rate / 1e12)} TFLOP/s"
        if rate >= 1e12
        else f"{_three_digits(rate / 1e9)} GFLOP/s"
    )


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"
