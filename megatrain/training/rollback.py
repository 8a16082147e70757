"""Goes back to a checkpoint from before a loss spike, in the running process, and passes over the samples seen since.

    step        ... 100 saved ... 128 spike begins . 130 noticed  |  101 ...
    samples     ..... to p .................................. to q|  from q on

So did PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1): restarted from about 100 steps before the spike, passing over the
200 to 500 batches seen before and during it; with other weights the same batches did no harm. A checkpoint is from before when the
loss of the step after it, which shows its weights, was none of the spike. One that the run has gone back to stays so, whatever comes then.

RUN/skipped_samples.jsonl has a line for each rollback: the step gone back to, and first and last sample passed over. It is written once
newer checkpoints are gone, and a run that resumes at that step and sample passes over them too: killed at any moment, it ends up
where it would have. A run that resumes from an earlier step forgets what came after it, as metrics.jsonl does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from megatrain import files
from megatrain.checkpoint import manifest, retention
from megatrain.checkpoint.train_state import TrainState
from megatrain.data.dataloader import DataLoader
from megatrain.distributed.collectives import broadcast_object
from megatrain.distributed.mesh import MeshAxis

FILE_NAME = "skipped_samples.jsonl"
NAMED = 100_000
"""Samples of a rollback whose documents are looked up and written down."""


class RollbackTarget(NamedTuple):
    """The checkpoint to go back to, how often the run has gone back to it already, and sentences on newer ones that were passed over."""

    path: Path | None
    times: int = 0
    passed: tuple[str, ...] = ()


def newest_from_before(since: int) -> int:
    """The latest step whose checkpoint is from before a spike that began at `since`: the loss of the step after it was none of it."""
    return since - 2


def find(
    folder: Path, *, since: int, own: Callable[[int], bool], hashes: bool, world: MeshAxis
) -> RollbackTarget:
    """The newest whole checkpoint of the run from before a spike that began at step `since`. Rank 0 looks, for all.

    `own` tells of a step whether its checkpoint is one that this run came from or has written: where an older one was resumed by hand,
    those of the steps after it are of a run that is no more.
    """
    return broadcast_object(
        _find(folder, since=since, own=own, hashes=hashes)
        if world.rank == 0
        else RollbackTarget(None),
        world,
    )


def _find(folder: Path, *, since: int, own: Callable[[int], bool], hashes: bool) -> RollbackTarget:
    before = [line["step"] for line in skipped(folder) if line["step"] < since]
    latest, passed = max([newest_from_before(since), *before]), list[str]()
    for path in sorted(
        (
            path
            for path in retention.list_checkpoints(folder / "checkpoints")
            if retention.step_number(path) <= latest and own(retention.step_number(path))
        ),
        reverse=True,
    ):
        wrong = manifest.find_problem(path, hashes=hashes)
        if wrong is None:
            return RollbackTarget(path, before.count(retention.step_number(path)), tuple(passed))
        passed.append(f"{path.name} {wrong}")
    return RollbackTarget(None, 0, tuple(passed))


def commit(
    folder: Path, *, back: TrainState, noticed: TrainState, since: int, loader: DataLoader
) -> None:
    """Make the return to `back` last: newer checkpoints go, newest first, and what is passed over is written down. For one rank."""
    newer = [
        path
        for path in retention.list_checkpoints(folder / "checkpoints")
        if back.step < retention.step_number(path) <= noticed.step
    ]
    retention.delete(sorted(newer, reverse=True))
    positions = range(back.samples, noticed.samples)
    line = {
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "step": back.step,
        "spike_began": since,
        "noticed": noticed.step,
        "first": positions[0],
        "last": positions[-1],
        "documents": _documents(loader, positions),
    }
    file = files.LineFile(folder / FILE_NAME)
    file.write(line)
    file.close()
    files.flush_to_disk(folder / FILE_NAME)


def resume(folder: Path, progress: TrainState, *, world: MeshAxis) -> TrainState:
    """Where a run goes on that starts at `progress`. All ranks call it together."""
    if world.rank == 0:
        _forget_after(folder, progress.step)
    return pass_over(folder, progress, world=world)


def pass_over(folder: Path, progress: TrainState, *, world: MeshAxis) -> TrainState:
    """With the position after the samples that the run has once passed over from there. All ranks call it together."""
    samples = progress.samples
    for line in skipped(folder) if world.rank == 0 else ():
        if line["step"] == progress.step and line["first"] == samples:
            samples = line["last"] + 1
    return progress._replace(samples=broadcast_object(samples, world))


def skipped(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's file, the oldest first; none where it has not gone back."""
    for line in files.read(folder / FILE_NAME):
        if all(type(line.get(name)) is int for name in ("step", "first", "last")):
            yield line


def _forget_after(folder: Path, step: int) -> None:
    """Drop the lines at the end that are about later steps; one before a line that is kept is part of how the run got there."""
    path, kept = folder / FILE_NAME, list(skipped(folder))
    known = len(kept)
    while kept and kept[-1]["step"] > step:
        kept.pop()
    if len(kept) == known:
        return
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    file = files.LineFile(new)
    for line in kept:
        file.write(line)
    file.close()
    files.flush_to_disk(new)
    new.replace(path)


def _documents(loader: DataLoader, positions: range) -> dict[str, list[int]] | None:
    """The documents that the samples at these positions have tokens of, by data set; None where the data cannot say, or they are too many."""
    origin: Callable[[int], tuple[str, list[int]]] | None = loader.origin
    if origin is None or len(positions) > NAMED:
        return None
    found: dict[str, set[int]] = {}
    for position in positions:
        path, documents = origin(position)
        found.setdefault(path, set()).update(documents)
    return {path: sorted(numbers) for path, numbers in sorted(found.items())}
