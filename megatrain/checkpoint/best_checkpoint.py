"""Which of a run's checkpoints did best in its evaluations, where the run goes by that (eval.early_stopping_patience): `best.json` beside them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatrain.checkpoint import manifest
from megatrain.distributed.env import is_local_rank_zero
from megatrain.errors import CheckpointError

FILE_NAME = "best.json"


def write_best(run_folder: Path, *, step: int, metric: str, value: float) -> None:
    """Say that the checkpoint after `step` is the best so far, whole or not at all."""
    new = run_folder / f"{FILE_NAME}.new"
    new.write_text(
        json.dumps({"step": step, "metric": metric, "value": value}) + "\n", encoding="utf-8"
    )
    new.replace(run_folder / FILE_NAME)


def restore_best(run_folder: Path, *, step: int | None, metric: str, value: float | None) -> None:
    """After a run went back: the best is that of `step` again, or none where there is none or it is no longer kept."""
    if (
        step is not None
        and value is not None
        and (run_folder / "checkpoints" / f"step-{step:08d}").is_dir()
    ):
        write_best(run_folder, step=step, metric=metric, value=value)
    else:
        (run_folder / FILE_NAME).unlink(missing_ok=True)


def best_checkpoint(run_folder: Path) -> Path | None:
    """The best checkpoint's folder; None where the run does not say, or it is not there."""
    try:
        step = int(json.loads((run_folder / FILE_NAME).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    path = run_folder / "checkpoints" / f"step-{step:08d}"
    return path if path.is_dir() else None


def chosen_checkpoint(run_folder: Path) -> Path:
    """What a run's folder means where a model is wanted: the best checkpoint where the run names one, else the newest whole one.

    The folder of its checkpoints means the same. What is passed over for being damaged is said on standard error: figures of
    another checkpoint than the user thinks of mislead.
    """
    best = best_checkpoint(run_folder.parent if run_folder.name == "checkpoints" else run_folder)
    wrong = None if best is None else manifest.find_problem(best)
    if best is not None and wrong is None:
        return best
    within = run_folder / "checkpoints"
    newest, passed = manifest.find_newest(within if within.is_dir() else run_folder)
    if newest is None:
        raise CheckpointError(
            f"{run_folder} holds no whole checkpoint{''.join(f'; {text}' for text in passed)}"
        )
    if best is not None:
        passed = [
            f"{best.name}, the run's best, {wrong}",
            *(text for text in passed if not text.startswith(f"{best.name} ")),
        ]
    if passed and is_local_rank_zero(os.environ):
        print(f"warning: {newest} is taken; passed over: {'; '.join(passed)}", file=sys.stderr)
    return newest
