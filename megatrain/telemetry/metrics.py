"""What a run writes about its steps: metrics.jsonl and TensorBoard events.

metrics.jsonl holds one JSON object a line. Lines with `loss` are training steps, lines with `valid_loss` evaluations.
Every step is there once: a run that resumes from step n first drops what was written about the steps after n. One that goes back to
step n by itself moves it to undone.jsonl, where a step may come several times; `undone_at` is the step that the run had reached.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatrain import files
from megatrain.errors import UserError
from megatrain.files import LineFile

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "metrics.jsonl"
UNDONE = "undone.jsonl"

Value = float | int | str | bool | None


class MetricsLog:
    """The metrics of one run, written by one rank.

    `after_step` is the step that the run resumes from, 0 at a start; what the folder holds about later ones is dropped.
    """

    def __init__(self, run_folder: Path | str, *, after_step: int) -> None:
        self.folder = Path(run_folder)
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._begin(after_step)

    def _begin(self, after_step: int) -> None:
        self.after_step = after_step
        drop_after(
            self.folder / FILE_NAME, step=after_step or -1
        )  # a run that starts evaluates at step 0, once more after a kill
        self._file = LineFile(self.folder / FILE_NAME)
        self._events: SummaryWriter | None = None

    def go_back(self, *, to: int, reached: int) -> None:
        """Go on after step `to` where the run had `reached` a later one; what was written about those in between is kept aside."""
        with self._writing():
            aside = LineFile(self.folder / UNDONE)
            for line in read(self.folder / FILE_NAME):
                if line["step"] > to:
                    aside.write({**line, "undone_at": reached})
            aside.close()
            self.close()
            self._begin(to)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Add a line about `step` and its numbers to the TensorBoard events; what is not finite is written as null."""
        with self._writing():
            self._file.write({"step": step, **values})
            for name, value in values.items():
                if (
                    isinstance(value, int | float)
                    and not isinstance(value, bool)
                    and math.isfinite(value)
                ):
                    self._writer().add_scalar(name, value, step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A run does not go on without its metrics: no step of them may be missing."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder / FILE_NAME} or tensorboard/ beside it cannot be written ({error.strerror}); checkpoints are as they "
                "were: make room, and start the same command to go on"
            ) from None

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _writer(self) -> SummaryWriter:
        if self._events is None:
            # Takes a second to import, and needs none of it before the first step.
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(
                str(self.folder / "tensorboard"),
                purge_step=self.after_step + 1 if self.after_step else None,
            )
        return self._events


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; what a kill cut short is left out."""
    return (line for line in files.read(path) if isinstance(line.get("step"), int))


def drop_after(path: Path, *, step: int) -> None:
    """Keep the whole lines up to `step`, in one move: a kill leaves the file as it was or as it should be."""
    if not path.exists():
        return
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
