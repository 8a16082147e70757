"""Schedules as CSV files: one row per rank, one cell per action.

A cell is the kind, the microbatch and, unless it is 0, the chunk: `F0`, `B0`, `I3`, `W3.1`. Empty
cells are idle time and are ignored. A line `# placement: v` or `# placement: loop` gives the
placement of several chunks. Without it the placement is the loop if the actions are legal there,
else the V.

    # placement: v
    F0,F0.1,I0.1,W0.1,,I0,W0
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import cast

from megatrain.errors import ConfigError
from megatrain.pipeline.schedule import (
    Action,
    Placement,
    Schedule,
    Shape,
    parse_action,
    peak_activations,
)
from megatrain.pipeline.verify import ScheduleError, check_schedule

_PLACEMENT = re.compile(r"#\s*placement\s*:\s*(\w+)")


def write_schedule(schedule: Schedule) -> str:
    """Returns a file's text, from which `read_schedule` reads the same actions and placement."""
    lines = [",".join(map(str, actions)) for actions in schedule.actions]
    if schedule.placement.chunks > 1:
        lines.insert(0, f"# placement: {schedule.placement.shape}")
    return "\n".join(lines) + "\n"


def read_schedule(path: str, ranks: int) -> Schedule:
    """Reads and verifies a schedule for `ranks` ranks; its peaks are those of its actions.

    Raises:
        ConfigError: if the file is unreadable, has another number of rows, an invalid cell, or
        actions
            that are not a legal schedule.
    """
    shape, rows = _read_rows(path)
    actions = [
        [_parse_cell(cell, path, row, column) for column, cell in enumerate(cells) if cell]
        for row, cells in enumerate(rows)
    ]
    if len(actions) != ranks:
        raise ConfigError(
            "parallel.schedule",
            path,
            f"has {len(actions)} rows, but parallel.pipeline={ranks} requires one row per rank",
            f"use a file with {ranks} rows",
            fix={"parallel.pipeline": len(actions)} if actions else {"parallel.schedule": "1f1b"},
        )
    chunks = _count_chunks(actions, path)
    shapes: tuple[Shape, ...] = ("loop", "v") if chunks > 1 else ("loop",)
    errors: list[ScheduleError] = []
    for candidate in shapes if shape is None else (shape,):
        peaks = [peak_activations(rank_actions) for rank_actions in actions]
        schedule = Schedule(path, Placement(ranks, chunks, candidate), actions, peaks)
        try:
            check_schedule(schedule, schedule.microbatches)
            return schedule
        except ScheduleError as error:
            errors.append(error)
    raise _error(
        path,
        f"is not a legal schedule: {errors[0]}",
        "each rank needs F and B, or F, I and W, of each microbatch and chunk once, "
        "in an executable order",
    )


def _read_rows(path: str) -> tuple[Shape | None, list[list[str]]]:
    """Returns the placement, if the file has one, and the cells of each rank."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        hint = "give the path of a CSV file of actions, one row per rank"
        raise _error(path, f"cannot be read: {reason}", hint) from None
    shape: Shape | None = None
    rows: list[list[str]] = []
    for line in lines:
        if line.lstrip().startswith("#"):
            shape = _parse_placement(line.strip(), path) or shape
        elif line.strip(" \t,"):
            rows.append([cell.strip() for cell in next(csv.reader([line]))])
    return shape, rows


def _parse_placement(comment: str, path: str) -> Shape | None:
    match = _PLACEMENT.match(comment)
    if match is None:
        return None
    if match[1] not in ("loop", "v"):
        raise _error(path, f"has `{comment}`, which is not a placement", "write loop or v")
    return cast(Shape, match[1])


def _parse_cell(cell: str, path: str, row: int, column: int) -> Action:
    action = parse_action(cell)
    if action is None:
        raise _error(
            path,
            f"has `{cell}` for rank {row} in column {column + 1}, which is not an action",
            "write F, B, I or W, the microbatch, and .chunk unless it is 0, as in F0 or I3.1",
        )
    return action


def _count_chunks(actions: list[list[Action]], path: str) -> int:
    """Returns the chunks per rank; raises if numbers are missing, before the expensive proof."""
    for name in ("microbatch", "chunk"):
        found = {getattr(action, name) for rank_actions in actions for action in rank_actions}
        missing = set(range(len(found))) - found
        if missing:
            raise _error(
                path,
                f"has {name} {max(found)}, but {name} {min(missing)} is missing",
                "number microbatches and chunks from 0",
            )
    return 1 + max(action.chunk for rank_actions in actions for action in rank_actions)


def _error(path: str, requirement: str, hint: str) -> ConfigError:
    return ConfigError(
        "parallel.schedule", path, requirement, hint, fix={"parallel.schedule": "1f1b"}
    )
