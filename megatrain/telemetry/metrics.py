"""Metrics of a run: metrics.jsonl and TensorBoard events.

metrics.jsonl has one JSON object per line. Lines with `loss` are training steps, lines with
`valid_loss` evaluations. Each step occurs once: a run that resumes from step n first drops the
lines of later steps. A rollback to step n moves them to rolled_back_metrics.jsonl, which can have a
step several times; there `undone_at` is the step that the run had reached.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatrain import files
from megatrain.errors import UserError
from megatrain.files import LineFile, write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "metrics.jsonl"
ROLLED_BACK = "rolled_back_metrics.jsonl"
_OLD_ROLLED_BACK = "undone.jsonl"

Value = float | int | str | bool | None


class MetricsLog:
    """Writes the metrics of a run, on one rank.

    Args:
        run_folder: folder of the run; lines of steps after `after_step` are dropped.
        after_step: step from which the run resumes, 0 at a start.
    """

    def __init__(self, run_folder: Path | str, *, after_step: int) -> None:
        self.folder = Path(run_folder)
        with self._user_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open(after_step)

    def _open(self, after_step: int) -> None:
        self.after_step = after_step
        # A run that starts evaluates at step 0, and again if it is restarted.
        drop_after(self.folder / FILE_NAME, step=after_step or -1)
        self._file = LineFile(self.folder / FILE_NAME)
        self._tensorboard: SummaryWriter | None = None

    def roll_back(self, *, to_step: int, from_step: int) -> None:
        """Moves the lines of all steps after `to_step` to rolled_back_metrics.jsonl."""
        with self._user_errors():
            rolled_back = LineFile(self.folder / ROLLED_BACK)
            for line in read(self.folder / FILE_NAME):
                if line["step"] > to_step:
                    rolled_back.write({**line, "undone_at": from_step})
            rolled_back.close()
            self.close()
            self._open(to_step)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Writes the metrics of a step to both files; non-finite numbers become null in JSON."""
        with self._user_errors():
            self._file.write({"step": step, **values})
            for name, value in values.items():
                if isinstance(value, bool | str) or value is None:
                    continue
                if math.isfinite(value):
                    self._tensorboard_writer().add_scalar(name, value, step)

    @contextlib.contextmanager
    def _user_errors(self) -> Iterator[None]:
        """Converts write errors to UserError, which ends the run: no step may lack its metrics."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder / FILE_NAME} or {self.folder / 'tensorboard'} cannot be written "
                f"({error.strerror}); checkpoints are complete: free disk space and re-run the "
                "same command to resume"
            ) from None

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tensorboard_writer(self) -> SummaryWriter:
        if self._tensorboard is None:
            # Imported late: it takes a second, and the first metrics come after the first step.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(self.folder / "tensorboard"),
                purge_step=self.after_step + 1 if self.after_step else None,
            )
        return self._tensorboard


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a metrics.jsonl; skips truncated lines."""
    return (line for line in files.read(path) if isinstance(line.get("step"), int))


def rolled_back_path(run_folder: Path) -> Path:
    """Returns the file of rolled-back metrics, also of runs of older versions."""
    path = run_folder / ROLLED_BACK
    return path if path.exists() else run_folder / _OLD_ROLLED_BACK


def drop_after(path: Path, *, step: int) -> None:
    """Drops the lines of all steps after `step`, atomically."""
    if not path.exists():
        return
    with write_atomically(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step)
