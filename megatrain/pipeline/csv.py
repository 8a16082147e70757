"""Schedules as CSV files: one row a rank, one cell an action.

A cell is the kind, the microbatch and, unless it is 0, the chunk: `F0`, `B0`, `I3`, `W3.1`. Empty cells are idle time and mean
nothing. A first line `# placement: v` or `# placement: loop` says how several chunks a rank are placed; without it, it is the
loop if the actions are legal in one, else the V.

    # placement: v
    F0,F0.1,I0.1,W0.1,,I0,W0
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Literal, cast

from megatrain.errors import ConfigError
from megatrain.pipeline.communication import ScheduleError, check_schedule
from megatrain.pipeline.schedule import Action, Kind, Placement, Schedule, peak_activations

Shape = Literal["loop", "v"]

_SETTING = "parallel.schedule"
_CELL = re.compile(r"([FBIW])(\d{1,9})(?:\.(\d{1,9}))?")
_PLACEMENT = re.compile(r"#\s*placement\s*:\s*(\w+)")


def write_schedule(schedule: Schedule) -> str:
    """A schedule as a file's text, from which `read_schedule` makes the same actions and placement."""
    lines = [",".join(map(str, actions)) for actions in schedule.actions]
    if schedule.placement.chunks > 1:
        lines.insert(0, f"# placement: {schedule.placement.shape}")
    return "\n".join(lines) + "\n"


def read_schedule(path: str, ranks: int) -> Schedule:
    """A schedule for `ranks` ranks, proved legal; its peaks are those that its actions have.

    Raises ConfigError where the file cannot be read, has another number of rows, a cell that is no action, or actions that
    are not a legal schedule.
    """
    shape, rows = _rows(path)
    actions = [
        [_action(cell, path, row, column) for column, cell in enumerate(cells) if cell]
        for row, cells in enumerate(rows)
    ]
    if len(actions) != ranks:
        raise ConfigError(
            _SETTING,
            path,
            f"has {len(actions)} rows of actions and parallel.pipeline={ranks} ranks need one each",
            f"use parallel.pipeline={len(actions)} or a file of {ranks} rows",
        )
    chunks = _chunks(actions, path)
    shapes: list[Shape] = (
        [shape] if shape is not None else ["loop", "v"] if chunks > 1 else ["loop"]
    )
    schedules = [_schedule(path, Placement(ranks, chunks, each), actions) for each in shapes]
    errors: list[ScheduleError] = []
    for schedule in schedules:
        try:
            check_schedule(schedule, microbatches_of(schedule))
            return schedule
        except ScheduleError as error:
            errors.append(error)
    raise ConfigError(
        _SETTING,
        path,
        f"is not a legal schedule: {errors[0]}",
        "each rank needs F and B, or F, I and W, of each microbatch and chunk once, in an order that can run",
    )


def microbatches_of(schedule: Schedule) -> int:
    """How many microbatches a schedule is for."""
    return 1 + max(action.microbatch for actions in schedule.actions for action in actions)


def _schedule(path: str, placement: Placement, actions: list[list[Action]]) -> Schedule:
    return Schedule(path, placement, actions, [peak_activations(of_rank) for of_rank in actions])


def _rows(path: str) -> tuple[Shape | None, list[list[str]]]:
    """The placement, where the file says it, and the cells of each rank."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            _SETTING,
            path,
            f"cannot be read: {reason}",
            "name a CSV file of actions, one row a rank",
        ) from None
    shape: Shape | None = None
    rows: list[list[str]] = []
    for line in lines:
        if line.lstrip().startswith("#"):
            shape = _shape(line, path) or shape
        elif line.strip(" \t,"):
            rows.append([cell.strip() for cell in next(csv.reader([line]))])
    return shape, rows


def _shape(line: str, path: str) -> Shape | None:
    """What a comment says of the placement, if it does."""
    found = _PLACEMENT.match(line.strip())
    if found is None:
        return None
    if found[1] not in ("loop", "v"):
        raise ConfigError(
            _SETTING, path, f"says `{line.strip()}`, which is no placement", "write loop or v"
        )
    return cast(Shape, found[1])


def _action(cell: str, path: str, row: int, column: int) -> Action:
    found = _CELL.fullmatch(cell)
    if found is None:
        raise ConfigError(
            _SETTING,
            path,
            f"has `{cell}` for rank {row} in column {column + 1}, which is no action",
            "write F, B, I or W, the microbatch, and .chunk unless it is 0, as in F0 or I3.1",
        )
    return Action(cast(Kind, found[1]), int(found[2]), int(found[3] or 0))


def _chunks(actions: list[list[Action]], path: str) -> int:
    """Chunks a rank; refuses numbers of microbatches or chunks with gaps, which would be checked at great length."""
    for name in ("microbatch", "chunk"):
        found = {getattr(action, name) for of_rank in actions for action in of_rank}
        missing = set(range(len(found))) - found
        if missing:
            raise ConfigError(
                _SETTING,
                path,
                f"has {name} {max(found)} and no {name} {min(missing)}",
                "count microbatches and chunks from 0",
            )
    return 1 + max(action.chunk for of_rank in actions for action in of_rank)
