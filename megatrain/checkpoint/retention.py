"""Which checkpoints of a run are kept. The only whole one never goes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from megatrain.checkpoint import manifest


def find_deletable(
    folder: Path,
    *,
    last: int,
    every: int,
    best: Path | None = None,
    back_to: int | None = None,
    until: int | None = None,
) -> list[Path]:
    """What may go: all but the newest `last` (0: all are kept), those of a multiple of `every` steps (0: none), and the run's best.

    `back_to` also keeps the newest whole one of at most that step. Those of steps after `until`, where the run is, are another run's: they
    neither go nor count. Nothing may go unless one that is kept is whole.
    """
    found = [
        path for path in sorted(checkpoints(folder)) if until is None or step_of(path) <= until
    ]
    if last == 0:
        return []
    old = [path for path in found[:-last] if path != best and (not every or step_of(path) % every)]
    if back_to is not None:
        target = next(
            (
                path
                for path in reversed(found)
                if step_of(path) <= back_to and manifest.find_problem(path) is None
            ),
            None,
        )
        old = [path for path in old if path != target]
    kept = [path for path in reversed(found) if path not in old]
    return old if any(manifest.find_problem(path) is None for path in kept) else []


def checkpoints(folder: Path) -> list[Path]:
    """Those in a run's folder of them, whole or not, in no order."""
    return [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def delete(folders: Iterable[Path]) -> None:
    """Rename each so that it is no checkpoint any more, then delete it."""
    for folder in folders:
        aside = folder.with_name(f"{manifest.DELETING}{folder.name}")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
