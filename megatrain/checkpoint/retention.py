"""The checkpoints of a run: which one is the best, and which may be deleted.

A run that evaluates for early stopping names its best checkpoint in `best_checkpoint.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from megatrain.checkpoint import manifest
from megatrain.distributed.env import is_local_rank_zero
from megatrain.errors import CheckpointError
from megatrain.files import write_atomically

BEST_FILE = "best_checkpoint.json"
_OLD_BEST_FILE = "best.json"
"""The name before format 3; still read."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a `checkpoints` folder, complete or not, unordered."""
    return [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]


def step_number(path: Path) -> int:
    """Returns the step of a checkpoint's folder name."""
    return int(path.name.removeprefix("step-"))


def find_deletable(
    folder: Path,
    *,
    keep_last: int,
    keep_every: int,
    best: Path | None = None,
    rollback_step: int | None = None,
    current_step: int | None = None,
) -> list[Path]:
    """Returns the checkpoints that the retention policy allows to delete.

    Kept are the `keep_last` newest checkpoints (0 keeps all), multiples of `keep_every` (0 keeps
    none for that reason) and the best one. The newest complete checkpoint at or before
    `rollback_step` is kept as well. Checkpoints after `current_step` belong to another run and
    are ignored. Returns an empty list if no complete checkpoint would remain.
    """
    if keep_last == 0:
        return []
    paths = [
        path
        for path in sorted(list_checkpoints(folder))
        if current_step is None or step_number(path) <= current_step
    ]
    kept: set[Path | None] = {
        path for path in paths if keep_every and step_number(path) % keep_every == 0
    }
    kept |= {*paths[-keep_last:], best}
    if rollback_step is not None:
        kept.add(_newest_complete(path for path in paths if step_number(path) <= rollback_step))
    if _newest_complete(path for path in paths if path in kept) is None:
        return []
    return [path for path in paths if path not in kept]


def _newest_complete(paths: Iterable[Path]) -> Path | None:
    newest_first = sorted(paths, reverse=True)
    return next((path for path in newest_first if manifest.find_problem(path) is None), None)


def delete(folders: Iterable[Path]) -> None:
    """Deletes checkpoints; each is renamed first, so that no partial one is left under its name."""
    for folder in folders:
        trash = folder.with_name(f"{manifest.TRASH}{folder.name}")
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def write_best(run_folder: Path, *, step: int, metric: str, value: float) -> None:
    """Records atomically that the checkpoint of `step` is the best so far."""
    content = {"step": step, "metric": metric, "value": value}
    with write_atomically(run_folder / BEST_FILE) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    (run_folder / _OLD_BEST_FILE).unlink(missing_ok=True)


def restore_best(run_folder: Path, *, step: int | None, metric: str, value: float | None) -> None:
    """Records the best checkpoint after a rollback, or none if it does not exist any more."""
    is_kept = step is not None and _folder_of(run_folder, step).is_dir()
    if step is not None and value is not None and is_kept:
        write_best(run_folder, step=step, metric=metric, value=value)
    else:
        for name in (BEST_FILE, _OLD_BEST_FILE):
            (run_folder / name).unlink(missing_ok=True)


def find_best(run_folder: Path) -> Path | None:
    """Returns the folder of the best checkpoint; None if there is none or it is missing."""
    path = run_folder / BEST_FILE
    path = path if path.exists() else run_folder / _OLD_BEST_FILE
    try:
        step = int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    folder = _folder_of(run_folder, step)
    return folder if folder.is_dir() else None


def _folder_of(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:08d}"


def select_checkpoint(run_folder: Path) -> Path:
    """Returns the checkpoint to use where a model is expected and a run folder is given.

    It is the best one if the run names one, else the newest complete one. The run's `checkpoints`
    folder is accepted as well. Local rank 0 prints a warning if a damaged checkpoint is skipped.

    Raises CheckpointError if the run has no complete checkpoint.
    """
    best = find_best(run_folder.parent if run_folder.name == "checkpoints" else run_folder)
    problem = None if best is None else manifest.find_problem(best)
    if best is not None and problem is None:
        return best
    checkpoints = run_folder / "checkpoints"
    newest, skipped = manifest.find_newest(checkpoints if checkpoints.is_dir() else run_folder)
    if newest is None:
        reasons = "".join(f"; {reason}" for reason in skipped)
        raise CheckpointError(f"{run_folder} contains no complete checkpoint{reasons}")
    if best is not None:
        others = [reason for reason in skipped if not reason.startswith(f"{best.name} ")]
        skipped = [f"{best.name}, the run's best, {problem}", *others]
    if skipped and is_local_rank_zero(os.environ):
        print(f"warning: using {newest}; skipped: {'; '.join(skipped)}", file=sys.stderr)
    return newest


def find_model_folder(path: Path) -> Path:
    """Returns the folder of a model: the path, or the selected checkpoint if it is a run's folder.

    Raises CheckpointError if the path does not exist, or the run has no complete checkpoint.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a checkpoint, a Hugging Face folder or a run's folder"
        )
    is_run = (path / "checkpoints").is_dir() or any(path.glob("step-*"))
    return select_checkpoint(path) if is_run and not (path / "config.json").exists() else path
