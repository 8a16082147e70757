"""Pipeline parallelism: schedules, their simulation, and their execution.

Public names, imported on first use and without torch: `make_schedule`, `register_schedule`,
`simulate`, `even_times`, `Times`, `Timeline`, `Schedule` and `Action`.

    >>> from megatrain import pipeline
    >>> schedule = pipeline.make_schedule("zb-v", ranks=4, microbatches=8)
    >>> timeline = pipeline.simulate(schedule)
    >>> timeline.makespan, timeline.peak_activations
    (25.5, [8, 8, 8, 8])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatrain.pipeline.registry import make_schedule, register_schedule
    from megatrain.pipeline.schedule import Action, Schedule
    from megatrain.pipeline.simulator import Timeline, Times, even_times, simulate

__all__ = [
    "Action",
    "Schedule",
    "Timeline",
    "Times",
    "even_times",
    "make_schedule",
    "register_schedule",
    "simulate",
]

_MODULES = {
    "Action": "schedule",
    "Schedule": "schedule",
    "Timeline": "simulator",
    "Times": "simulator",
    "even_times": "simulator",
    "make_schedule": "registry",
    "register_schedule": "registry",
    "simulate": "simulator",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
