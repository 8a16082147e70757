"""Marks of what a rank is doing, which survive a kill; and ranks with slow disks and wrong clocks.

A rank keeps counts in a file that is mapped into its memory: for each phase, how often it was
entered and whether it is active. A test reads them after it has killed the rank. Environment
variables of the job enable this:

    MARKS=FOLDER            the files, FOLDER/JOB-ATTEMPT-RANK
    MARKS_SLOW=0.02         seconds added to each fsync, rename and read of a tensor: a remote disk
    MARKS_CLOCK=node2:3600  seconds by which the clock of a node is ahead
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PHASES = ("loading", "stepping", "evaluating", "saving")
_SIZE = 8 * (1 + len(PHASES))


class State(NamedTuple):
    """A rank's process, the number of entries of each phase, and the active phases."""

    process: int
    entered: dict[str, int]
    active: frozenset[str]

    @property
    def phase(self) -> str:
        """The most specific active phase: a save runs beside steps and evaluations."""
        return next(
            (
                name
                for name in ("saving", "evaluating", "loading", "stepping")
                if name in self.active
            ),
            "between",
        )


def read(folder: Path, job: str, attempt: int, rank: int) -> State | None:
    """Returns the marks of a rank; None before it has started."""
    try:
        values = struct.unpack(f"<{_SIZE // 4}I", (folder / f"{job}-{attempt}-{rank}").read_bytes())
    except FileNotFoundError:
        return None
    counts, active = values[2::2], values[3::2]
    return State(
        values[0],
        dict(zip(PHASES, counts, strict=True)),
        frozenset(name for name, on in zip(PHASES, active, strict=True) if on),
    )


def install(environ: Mapping[str, str]) -> None:
    """Applies the environment variables to this process."""
    if seconds := float(environ.get("MARKS_SLOW", 0)):
        _slow_files(seconds)
    node, _, ahead = environ.get("MARKS_CLOCK", "").partition(":")
    if node and node == environ.get("SLURMD_NODENAME"):
        real = time.time
        time.time = lambda: real() + float(ahead)
    if (
        "MARKS" in environ
        and "SLURM_PROCID" in environ
        and environ.get("SLURM_STEP_ID", "").isdigit()
    ):
        attempt = environ.get("SLURM_RESTART_COUNT", 0)
        name = f"{environ['SLURM_JOB_ID']}-{attempt}-{environ['SLURM_PROCID']}"
        _mark_phases(_Marks(Path(environ["MARKS"]) / name))


class _Marks:
    def __init__(self, path: Path) -> None:
        new = path.with_name(path.name + ".new")
        new.write_bytes(bytes(_SIZE))
        with new.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        struct.pack_into("<I", self._map, 0, os.getpid())
        new.rename(path)

    def begin(self, phase: str) -> None:
        at = 8 * (1 + PHASES.index(phase))
        (count,) = struct.unpack_from("<I", self._map, at)
        struct.pack_into("<II", self._map, at, count + 1, 1)

    def end(self, phase: str) -> None:
        struct.pack_into("<I", self._map, 8 * (1 + PHASES.index(phase)) + 4, 0)


def _mark_phases(marks: _Marks) -> None:
    from megatrain.checkpoint import resume
    from megatrain.checkpoint.checkpointer import Checkpointer
    from megatrain.training.step_runner import StepRunner

    def during(phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def marked(*args: Any, **kwargs: Any) -> Any:
            marks.begin(phase)
            try:
                return work(*args, **kwargs)
            finally:
                marks.end(phase)

        return marked

    resume.load = during("loading", resume.load)
    StepRunner.train_step = during("stepping", StepRunner.train_step)  # type: ignore[method-assign]
    StepRunner.evaluate = during("evaluating", StepRunner.evaluate)  # type: ignore[method-assign]
    _mark_saving(marks, Checkpointer)


def _mark_saving(marks: _Marks, saver: type) -> None:
    """Marks saving: from the copy of tensors until all ranks know the checkpoint."""
    save, proceed = saver.save, saver.proceed  # type: ignore[attr-defined]

    def marked_save(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.finish()
        marks.begin("saving")
        assert save(self, *args, **kwargs) is None
        return before

    def marked_proceed(self: Any, **kwargs: Any) -> Any:
        saved = proceed(self, **kwargs)
        if saved is not None:
            marks.end("saving")
        return saved

    saver.save, saver.proceed = marked_save, marked_proceed  # type: ignore[attr-defined]


def _slow_files(seconds: float) -> None:
    from megatrain.checkpoint.optimizer_state import OptimizerState

    def delayed(work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def done(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return work(*args, **kwargs)

        return done

    os.fsync, os.rename, os.unlink = (
        delayed(os.fsync),
        delayed(os.rename),
        delayed(os.unlink),
    )
    OptimizerState.load = delayed(OptimizerState.load)  # type: ignore[method-assign]
