"""From settings to a schedule, by name or from a CSV file. What cannot work is a ConfigError, before any rank starts."""

from __future__ import annotations

import difflib

from megatrain.errors import ConfigError
from megatrain.pipeline.csv import microbatches_of, read_schedule
from megatrain.pipeline.schedule import Schedule
from megatrain.pipeline.schedules import SCHEDULES, ScheduleSpec, make_schedule


def choose_schedule(
    schedule: str, *, ranks: int, microbatches: int, virtual: int | None = None, sequences: int = 1
) -> Schedule:
    """The schedule that `parallel.schedule` names.

    Args:
        schedule: a name or the path of a CSV file, which ends with .csv.
        virtual: `parallel.virtual`, chunks a rank; None for what the schedule has of itself.
        sequences: in one microbatch over all replicas, so that errors can speak of `train.global_batch_size`.
    """
    if schedule.lower().endswith(".csv"):
        return _from_file(schedule, ranks, microbatches, virtual, sequences)
    check_choice(
        schedule, ranks=ranks, microbatches=microbatches, virtual=virtual, sequences=sequences
    )
    return make_schedule(schedule, ranks, microbatches, virtual)


def check_choice(
    schedule: str, *, ranks: int, microbatches: int, virtual: int | None = None, sequences: int = 1
) -> None:
    """Refuse a name that there is not, and numbers that it cannot do."""
    check_name(schedule)
    family = SCHEDULES[schedule]
    _check_virtual(schedule, family, virtual)
    fewest = family.fewest_microbatches(ranks)
    if microbatches < fewest:
        raise ConfigError(
            "train.global_batch_size",
            microbatches * sequences,
            f"makes {_count(microbatches)} and parallel.schedule={schedule} on {ranks} ranks needs {fewest} or more",
            f"use {fewest * sequences} or more, or another schedule",
        )


def check_name(schedule: str) -> None:
    """Refuse a name that there is not."""
    if schedule not in SCHEDULES:
        close = difflib.get_close_matches(schedule, SCHEDULES, n=1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"use {', '.join(SCHEDULES)}, auto or the path of a .csv file"
        )
        raise ConfigError("parallel.schedule", schedule, "is not a schedule", hint)


def _check_virtual(schedule: str, family: ScheduleSpec, virtual: int | None) -> None:
    if virtual is None or virtual == family.chunks or (family.any_chunks and virtual >= 2):
        return
    if family.any_chunks:
        rule, way_out = (
            f"and parallel.schedule={schedule} needs 2 or more chunks of layers a rank",
            "use 2, or parallel.schedule=1f1b",
        )
    elif family.chunks == 1:
        rule, way_out = (
            f"and parallel.schedule={schedule} has one chunk of layers a rank",
            "use 1, or parallel.schedule=interleaved",
        )
    else:
        rule, way_out = (
            f"and parallel.schedule={schedule} has {family.chunks} chunks of layers a rank",
            f"use {family.chunks}",
        )
    raise ConfigError(
        "parallel.virtual", virtual, rule, f"{way_out}, or leave parallel.virtual out"
    )


def _from_file(
    path: str, ranks: int, microbatches: int, virtual: int | None, sequences: int
) -> Schedule:
    schedule = read_schedule(path, ranks)
    chunks, held = schedule.placement.chunks, microbatches_of(schedule)
    if virtual not in (None, chunks):
        raise ConfigError(
            "parallel.virtual",
            virtual,
            f"and parallel.schedule={path} has {_count(chunks, 'chunk')} a rank",
            f"use {chunks} or leave parallel.virtual out",
        )
    if held != microbatches:
        raise ConfigError(
            "train.global_batch_size",
            microbatches * sequences,
            f"makes {_count(microbatches)} and parallel.schedule={path} is for {held}",
            f"use {held * sequences}",
        )
    return schedule


def _count(number: int, what: str = "microbatch") -> str:
    plural = what + ("es" if what.endswith("h") else "s")
    return f"{number} {what if number == 1 else plural}"
