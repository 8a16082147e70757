"""Detects loss spikes, and goes back to a checkpoint from before one while the run keeps running.

A spike is a loss far above the median of the losses before it, for some steps in a row. The
distance is measured in robust standard deviations: 1.4826 times the median distance from the
median, which single outliers do not change. OLMo 2 uses 7 of them as well (arXiv 2501.00656).

    step        ... 100 saved ... 128 spike begins . 130 noticed  |  101 ...
    samples     ..... to p .................................. to q|  from q on

A rollback loads the checkpoint and skips the samples seen since, as PaLM did (Chowdhery et al.
2022, arXiv 2204.02311, section 5.1): restarted from about 100 steps before the spike and skipping
200 to 500 batches, the same batches did no harm later, with other weights. A checkpoint is from
before the spike if the loss of the step after it, which its weights determine, is not part of the
spike. A checkpoint that the run has gone back to once counts as such from then on.

RUN/skipped_samples.jsonl has a line for each rollback: the step gone back to, and the first and
last skipped sample. It is written after newer checkpoints are deleted. A run that resumes at that
step and sample skips them too, so it may be killed at any moment of a rollback. A run that resumes
from an earlier step drops the lines of later steps, as metrics.jsonl does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatrain import files
from megatrain.checkpoint import manifest, resume, retention
from megatrain.checkpoint.train_state import TrainState
from megatrain.config.schema import StabilityConfig
from megatrain.data.dataloader import DataLoader
from megatrain.distributed.collectives import broadcast_object
from megatrain.distributed.mesh import MeshAxis
from megatrain.errors import UserError
from megatrain.telemetry.metrics import Value
from megatrain.training.callback import Callback

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepReport
    from megatrain.training.trainer import Trainer

FILE_NAME = "skipped_samples.jsonl"
MAX_LISTED_SAMPLES = 100_000
"""Skipped samples of a rollback whose documents are looked up and listed at most."""

_NORMAL = 1.4826
"""Standard deviation of a normal distribution in median absolute deviations."""
_MIN_RELATIVE_DEVIATION = 0.01
"""Least deviation relative to the median: nearly constant losses would make any change a spike."""


class LossSpikes(Callback):
    """Warns of loss spikes, and undoes them if `on_loss_spike` is `rollback`.

    A rollback also undoes as many non-finite steps in a row as would end the run.
    """

    def __init__(self, stability: StabilityConfig, *, check_hashes: bool) -> None:
        self.stability, self.check_hashes = stability, check_hashes
        self._before = TrainState(0, 0, 0)

    def on_step_begin(self, trainer: Trainer, step: int) -> None:
        """Keeps the state before the step, whose losses set the threshold."""
        self._before = trainer.state

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Updates `spike_since` of the state; logs a spike; goes back if that is needed."""
        threshold = spike_threshold(self._before.losses, self.stability)
        trainer.state = trainer.state._replace(
            spike_since=spike_since(self._before, report.loss, threshold)
        )
        if threshold is not None and is_noticed(trainer.state, self.stability):
            trainer.run_logger.log_spike(trainer.state, threshold)
        since = first_step_to_undo(trainer.state, self.stability)
        if since:
            self._roll_back(trainer, since, metrics)

    def _roll_back(self, trainer: Trainer, since: int, metrics: dict[str, Value]) -> None:
        """Undoes the steps from `since` on, if there is a checkpoint from before them."""
        trainer.activity.set_phase("going back to a checkpoint")
        trainer.finish_saving()
        undone, folder, world = trainer.state, trainer.output_dir, trainer.mesh.world
        target = find_target(
            folder,
            since=since,
            is_own=trainer.is_own_checkpoint,
            hashes=self.check_hashes,
            world=world,
        )
        if target.path is None:
            trainer.run_logger.log_missing_rollback(undone, target.problems)
            return
        if target.times >= self.stability.max_rollbacks:
            raise UserError(
                f"the run went back to {target.path} {target.times} times "
                f"(stability.max_rollbacks) and fails again at step {since}; lower optimizer.lr, "
                "resume from an older checkpoint with checkpoint.resume=FOLDER, or inspect the "
                f"documents that {FILE_NAME} lists"
            )
        state = resume.load(
            target.path,
            optimizer=trainer.runner.optimizer,
            global_batch_size=trainer.config.train.global_batch_size,
            mesh=trainer.mesh,
        )
        state = skip_samples(folder, state, world=world)
        trainer.run_logger.write(undone.step, metrics)
        if trainer.run_logger.is_main_process:
            commit(folder, state=state, undone=undone, since=since, loader=trainer.train_data)
        trainer.run_logger.log_rollback(undone, state, target.path)
        trainer.set_state_after_rollback(state._replace(samples=undone.samples), undone)


# -- detection -----------------------------------------------------------------------------------


class SpikeThreshold(NamedTuple):
    """The highest loss below a spike, and the numbers it is computed from."""

    loss: float
    median: float
    deviation: float


def spike_threshold(losses: tuple[float, ...], stability: StabilityConfig) -> SpikeThreshold | None:
    """Returns the threshold of the next loss; None if detection is off or losses are too few."""
    if stability.on_loss_spike == "off" or len(losses) < stability.spike_window:
        return None
    recent = losses[-stability.spike_window :]
    median = statistics.median(recent)
    deviation = max(
        _NORMAL * statistics.median(abs(loss - median) for loss in recent),
        _MIN_RELATIVE_DEVIATION * abs(median),
    )
    return SpikeThreshold(median + stability.spike_threshold * deviation, median, deviation)


def spike_since(before: TrainState, loss: float, threshold: SpikeThreshold | None) -> int:
    """Returns the first step of the spike that the next step is part of, or 0.

    Non-finite losses neither start nor end a spike.

    Args:
        before: the state before the step.
        loss: the loss of the step.
    """
    if math.isfinite(loss):
        is_spike = threshold is not None and loss > threshold.loss
    else:
        is_spike = before.spike_since > 0
    return (before.spike_since or before.step + 1) if is_spike else 0


def is_noticed(state: TrainState, stability: StabilityConfig) -> bool:
    """Returns True at the one step at which a spike has lasted long enough."""
    return state.spike_since > 0 and state.step - state.spike_since + 1 == stability.spike_patience


def first_step_to_undo(state: TrainState, stability: StabilityConfig) -> int:
    """Returns the first step that a rollback must undo, or 0 if none is needed.

    A rollback undoes a spike, or as many non-finite steps in a row as would end the run.
    """
    if stability.on_loss_spike != "rollback":
        return 0
    if is_noticed(state, stability):
        return state.spike_since
    return (
        state.step - state.bad_steps + 1 if state.bad_steps >= stability.max_nonfinite_steps else 0
    )


def is_guarded(state: TrainState, stability: StabilityConfig) -> bool:
    """Returns True if the next losses are checked for spikes and a spike leads to a rollback."""
    return (
        stability.on_loss_spike == "rollback"
        and spike_threshold(state.losses, stability) is not None
    )


# -- rollback ------------------------------------------------------------------------------------


class RollbackTarget(NamedTuple):
    """The checkpoint to go back to, if there is one.

    Attributes:
        times: how often the run has gone back to it before.
        problems: a description of each newer checkpoint that is incomplete.
    """

    path: Path | None
    times: int = 0
    problems: tuple[str, ...] = ()


def newest_step_before(since: int) -> int:
    """Returns the latest step whose checkpoint is from before a spike that began at `since`.

    The loss of the step after the checkpoint must not be part of the spike.
    """
    return since - 2


def find_target(
    folder: Path, *, since: int, is_own: Callable[[int], bool], hashes: bool, world: MeshAxis
) -> RollbackTarget:
    """Returns the newest complete checkpoint from before a spike; rank 0 looks for all ranks.

    Args:
        folder: the folder of the run.
        since: the first step of the spike.
        is_own: returns True for the steps whose checkpoints this run resumed from or wrote. If an
            older checkpoint was resumed by hand, those of later steps belong to an abandoned run.
        hashes: compare the content of the files with the manifest, too.
    """
    target = RollbackTarget(None)
    if world.rank == 0:
        target = _find_target(folder, since=since, is_own=is_own, hashes=hashes)
    return broadcast_object(target, world)


def _find_target(
    folder: Path, *, since: int, is_own: Callable[[int], bool], hashes: bool
) -> RollbackTarget:
    earlier_targets = [line["step"] for line in read_rollbacks(folder) if line["step"] < since]
    latest = max([newest_step_before(since), *earlier_targets])
    problems: list[str] = []
    for path in sorted(retention.list_checkpoints(folder / "checkpoints"), reverse=True):
        step = retention.step_number(path)
        if step > latest or not is_own(step):
            continue
        problem = manifest.find_problem(path, hashes=hashes)
        if problem is None:
            return RollbackTarget(path, earlier_targets.count(step), tuple(problems))
        problems.append(f"{path.name} {problem}")
    return RollbackTarget(None, 0, tuple(problems))


def commit(
    folder: Path, *, state: TrainState, undone: TrainState, since: int, loader: DataLoader
) -> None:
    """Makes a rollback permanent: deletes newer checkpoints, then records the skipped samples.

    Args:
        state: the state of the checkpoint.
        undone: the state that the run had reached.
        since: the first step of the spike.
    """
    newer = [
        path
        for path in retention.list_checkpoints(folder / "checkpoints")
        if state.step < retention.step_number(path) <= undone.step
    ]
    retention.delete(sorted(newer, reverse=True))
    positions = range(state.samples, undone.samples)
    line = {
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "step": state.step,
        "spike_began": since,
        "noticed": undone.step,
        "first": positions[0],
        "last": positions[-1],
        "documents": _documents(loader, positions),
    }
    file = files.LineFile(folder / FILE_NAME)
    file.write(line)
    file.close()
    files.flush_to_disk(folder / FILE_NAME)


def resume_skipping(folder: Path, state: TrainState, *, world: MeshAxis) -> TrainState:
    """Returns the state to resume in, after what rollbacks skipped. All ranks call it.

    Lines of later steps are dropped from skipped_samples.jsonl.
    """
    if world.rank == 0:
        _drop_lines_after(folder, state.step)
    return skip_samples(folder, state, world=world)


def skip_samples(folder: Path, state: TrainState, *, world: MeshAxis) -> TrainState:
    """Returns the state with the sample position after those that rollbacks to it skipped.

    All ranks call it.
    """
    samples = state.samples
    for line in read_rollbacks(folder) if world.rank == 0 else ():
        if line["step"] == state.step and line["first"] == samples:
            samples = line["last"] + 1
    return state._replace(samples=broadcast_object(samples, world))


def read_rollbacks(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of skipped_samples.jsonl, the oldest first."""
    for line in files.read(folder / FILE_NAME):
        if all(type(line.get(name)) is int for name in ("step", "first", "last")):
            yield line


def _drop_lines_after(folder: Path, step: int) -> None:
    """Drops the lines of later steps at the end of the file.

    Such a line before one that is kept belongs to the history of the state and stays.
    """
    path = folder / FILE_NAME
    lines = list(read_rollbacks(folder))
    kept = list(lines)
    while kept and kept[-1]["step"] > step:
        kept.pop()
    if len(kept) == len(lines):
        return
    with files.write_atomically(path) as temporary:
        temporary.unlink(missing_ok=True)  # left behind by a killed process
        file = files.LineFile(temporary)
        for line in kept:
            file.write(line)
        file.close()


def _documents(loader: DataLoader, positions: range) -> dict[str, list[int]] | None:
    """Returns the documents that the samples at `positions` have tokens of, by data set.

    Returns None if the data do not have documents or the samples are too many.
    """
    origin: Callable[[int], tuple[str, list[int]]] | None = loader.origin
    if origin is None or len(positions) > MAX_LISTED_SAMPLES:
        return None
    documents: dict[str, set[int]] = {}
    for position in positions:
        path, numbers = origin(position)
        documents.setdefault(path, set()).update(numbers)
    return {path: sorted(numbers) for path, numbers in sorted(documents.items())}
