"""Finds the schedule of `parallel.schedule`: built-in, registered by the user, or a CSV file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from megatrain.errors import ConfigError
from megatrain.pipeline.schedule import Action, Schedule, Shape, parse_action, peak_activations
from megatrain.pipeline.schedule_csv import read_schedule
from megatrain.pipeline.schedules import SCHEDULES, ScheduleSpec, from_spec
from megatrain.pipeline.verify import ScheduleError, check_schedule

MakeActions = Callable[[int, int, int], Sequence[Action | str]]
"""Maps (rank, ranks, microbatches) to the rank's actions."""

_registered: dict[str, ScheduleSpec] = {}


def make_schedule(
    name: str,
    *,
    ranks: int,
    microbatches: int,
    virtual_stages: int | None = None,
    sequences_per_microbatch: int = 1,
) -> Schedule:
    """Returns a pipeline schedule for all ranks.

    Args:
        name: `gpipe`, `1f1b`, `interleaved`, `zb-h1`, `zb-v`, `dualpipev`, a registered name
            (`register_schedule`), or the path of a CSV file (`megatrain schedule --csv`).
        ranks: pipeline ranks (`parallel.pipeline`). microbatches: microbatches of one step.
        virtual_stages: stages per rank (`parallel.virtual`); None takes the schedule's default.
        sequences_per_microbatch: sequences of one microbatch over all data-parallel replicas.
        Errors
            use it to suggest a `train.global_batch_size`.

    Returns:
        The schedule: the actions of each rank, its placement, and the declared peaks of
        activations.

    Raises:
        ConfigError: if the name is unknown, a number is not supported, or a user's schedule is not
            legal. `error.setting` is the setting, `error.fix` a change that removes the error.

    Example:
        >>> from megatrain.pipeline import make_schedule
        >>> schedule = make_schedule("1f1b", ranks=2, microbatches=2)
        >>> print(*schedule.actions[0])
        F0 F1 B0 B1
    """
    if is_csv(name):
        return _from_file(name, ranks, microbatches, virtual_stages, sequences_per_microbatch)
    check_supported(
        name,
        ranks=ranks,
        microbatches=microbatches,
        virtual_stages=virtual_stages,
        sequences_per_microbatch=sequences_per_microbatch,
    )
    schedule = from_spec(name, find_spec(name), ranks, microbatches, virtual_stages)
    if name in _registered:
        _verify_registered(schedule, microbatches)
    return schedule


def register_schedule(
    name: str,
    make_actions: MakeActions,
    *,
    virtual_stages: int = 1,
    placement: Shape = "loop",
    min_microbatches_per_rank: int = 0,
) -> None:
    """Registers a schedule, which `parallel.schedule` can then name.

    Each process that trains must register it. Ranks on CPUs are forked and inherit it. Ranks on
    GPUs import the main script again, so call this function at module level.

    Args:
        name: new name for `parallel.schedule`. Registering a name again replaces its schedule.
        make_actions: function of (rank, ranks, microbatches) that returns the rank's actions in
        order,
            as `Action` or as text: `F0` forward, `B0` backward, `I0` and `W0` its two parts, of
            microbatch 0; `F0.1` in the rank's second virtual stage.
        virtual_stages: stages per rank.
        placement: order of the virtual stages: `loop`, or `v` to turn round after each.
        min_microbatches_per_rank: least number of microbatches, as a multiple of the ranks.

    Raises:
        ConfigError: if the name is built-in, `auto` or the name of a CSV file, or if the number of
            virtual stages is less than 1. `make_schedule` verifies the actions: complete, ordered
            and free of deadlocks.

    Example:
        >>> from megatrain.pipeline import make_schedule, register_schedule
        >>> def forwards_first(rank, ranks, microbatches):
        ...     return [f"{kind}{index}" for kind in "FB" for index in range(microbatches)]
        >>> register_schedule("forwards-first", forwards_first)
        >>> make_schedule("forwards-first", ranks=2, microbatches=3).peaks
        [3, 3]
    """
    if name in SCHEDULES or name == "auto" or is_csv(name):
        raise ConfigError(
            "parallel.schedule", name, "cannot be registered", "the name is reserved; use another"
        )
    if virtual_stages < 1:
        raise ConfigError(
            "virtual_stages", virtual_stages, "must be at least 1", fix={"virtual_stages": 1}
        )

    def actions(rank: int, ranks: int, microbatches: int, chunks: int) -> list[Action]:
        return [_to_action(name, item) for item in make_actions(rank, ranks, microbatches)]

    def peak(rank: int, ranks: int, microbatches: int, chunks: int) -> int:
        return peak_activations(actions(rank, ranks, microbatches, chunks))

    _registered[name] = ScheduleSpec(
        actions,
        peak,
        placement,
        virtual_stages,
        min_microbatches_per_rank=min_microbatches_per_rank,
        bounded_peak=False,
    )


def is_csv(name: str) -> bool:
    """Returns True if a schedule's name is the path of a CSV file."""
    return name.lower().endswith(".csv")


def find_spec(name: str) -> ScheduleSpec:
    """Returns the spec of a built-in or registered schedule.

    Raises:
        ConfigError: if there is none.
    """
    specs = {**SCHEDULES, **_registered}
    if name in specs:
        return specs[name]
    close = difflib.get_close_matches(name, specs, n=1)
    names = f"known are {', '.join(specs)}, auto, and paths of .csv files"
    raise ConfigError(
        "parallel.schedule",
        name,
        "is not a schedule",
        f"did you mean {close[0]}?" if close else names,
        fix={"parallel.schedule": close[0] if close else "1f1b"},
    )


def check_supported(
    name: str,
    *,
    ranks: int,
    microbatches: int,
    virtual_stages: int | None = None,
    sequences_per_microbatch: int = 1,
) -> None:
    """Raises ConfigError if the name is unknown or does not support these numbers."""
    spec = find_spec(name)
    _check_virtual_stages(name, spec, virtual_stages)
    least = spec.min_microbatches(ranks)
    if microbatches < least:
        raise ConfigError(
            "train.global_batch_size",
            microbatches * sequences_per_microbatch,
            f"gives {_microbatches(microbatches)}, but parallel.schedule={name} on {ranks} ranks "
            f"requires at least {least}",
            f"set at least {least * sequences_per_microbatch}, or use another schedule",
            fix={"train.global_batch_size": least * sequences_per_microbatch},
        )


def _check_virtual_stages(name: str, spec: ScheduleSpec, virtual_stages: int | None) -> None:
    if virtual_stages in (None, spec.chunks) or (spec.any_chunks and (virtual_stages or 0) >= 2):
        return
    if spec.any_chunks:
        supported, hint = "at least 2", "for 1, use parallel.schedule=1f1b"
    else:
        supported = str(spec.chunks)
        hint = "for more, use parallel.schedule=interleaved" if spec.chunks == 1 else ""
    raise ConfigError(
        "parallel.virtual",
        virtual_stages,
        f"is not supported by parallel.schedule={name} (supported: {supported})",
        hint,
        fix={"parallel.virtual": spec.chunks},
    )


def _from_file(
    path: str, ranks: int, microbatches: int, virtual_stages: int | None, sequences: int
) -> Schedule:
    schedule = read_schedule(path, ranks)
    chunks = schedule.placement.chunks
    if virtual_stages not in (None, chunks):
        raise ConfigError(
            "parallel.virtual",
            virtual_stages,
            f"does not match parallel.schedule={path}, which has {chunks} per rank",
            fix={"parallel.virtual": chunks},
        )
    if schedule.microbatches != microbatches:
        raise ConfigError(
            "train.global_batch_size",
            microbatches * sequences,
            f"gives {_microbatches(microbatches)}, but parallel.schedule={path} has "
            f"{schedule.microbatches}",
            fix={"train.global_batch_size": schedule.microbatches * sequences},
        )
    return schedule


def _verify_registered(schedule: Schedule, microbatches: int) -> None:
    try:
        check_schedule(schedule, microbatches)
    except ScheduleError as error:
        raise ConfigError(
            "parallel.schedule",
            schedule.name,
            f"is not a legal schedule: {error}",
            "correct the function given to register_schedule",
            fix={"parallel.schedule": "1f1b"},
        ) from None


def _to_action(name: str, item: Any) -> Action:
    action = item if isinstance(item, Action) else parse_action(str(item))
    if action is None:
        raise ConfigError(
            "parallel.schedule",
            name,
            f"has `{item}`, which is not an action",
            "write actions as F0, B0, I0, W0, or F0.1 in virtual stage 1",
            fix={"parallel.schedule": "1f1b"},
        )
    return action


def _microbatches(number: int) -> str:
    return f"{number} microbatch{'' if number == 1 else 'es'}"
