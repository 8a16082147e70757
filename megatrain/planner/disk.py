"""The size of a run's checkpoints, the number kept at once, and the free disk space."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from megatrain.checkpoint import retention
from megatrain.config.loader import Config
from megatrain.errors import ConfigError
from megatrain.ops.dtypes import DTYPES
from megatrain.optim.param_groups import STATES
from megatrain.planner.run_spec import RunSpec
from megatrain.text import format_bytes


class DiskEstimate(NamedTuple):
    """Disk space of a run's checkpoints.

    Attributes:
        checkpoint_bytes: size of one checkpoint.
        num_kept: checkpoints at once; the least number if it depends on data of unknown size.
        is_bounded: whether `num_kept` is the most.
        num_existing: checkpoints of the run that exist already.
        folder: the output folder, or its nearest parent that exists.
        free_bytes: free space at `folder`.
    """

    checkpoint_bytes: int
    num_kept: int
    is_bounded: bool
    num_existing: int
    folder: Path
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.checkpoint_bytes * max(1, self.num_kept - self.num_existing)


def estimate_disk(spec: RunSpec) -> DiskEstimate:
    """Returns the disk space of a run whose length is known in steps, tokens or epochs."""
    output = Path(spec.config.run.output_dir)
    folder = existing_folder(output)
    checkpoint = spec.config.checkpoint
    has_retention = checkpoint.keep_last > 0 and not checkpoint.keep_every
    return DiskEstimate(
        checkpoint_bytes(spec),
        _num_kept(spec),
        spec.steps is not None or not checkpoint.save_every or has_retention,
        len(retention.list_checkpoints(output / "checkpoints")),
        folder,
        shutil.disk_usage(folder).free,
    )


def checkpoint_bytes(spec: RunSpec) -> int:
    """Returns the size of weights in the run's dtype, fp32 masters and fp32 optimizer state.

    With LoRA these are the adapters' alone.
    """
    num_states = len(STATES[spec.config.optimizer.name])
    weight_bytes = DTYPES[spec.config.train.dtype].itemsize
    return spec.num_trained_parameters * (weight_bytes + 4 * (1 + num_states))


def existing_folder(path: Path) -> Path:
    """Returns the path, or its nearest parent that exists."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())


def _num_kept(spec: RunSpec) -> int:
    """Returns the number of checkpoints at once.

    It is one more than the retention keeps: the oldest is deleted once the newest is complete.
    """
    config, steps = spec.config, spec.steps
    checkpoint = config.checkpoint
    if not checkpoint.save_every:
        return 1
    if steps is None:
        return checkpoint.keep_last + 1 if checkpoint.keep_last else 1
    saves = max(1, -(-steps // checkpoint.save_every))
    if not checkpoint.keep_last:
        return saves
    multiples = steps // checkpoint.keep_every if checkpoint.keep_every else 0
    for_rollback = config.stability.on_loss_spike == "rollback"
    return min(saves, checkpoint.keep_last + for_rollback + multiples + 1)


def describe_kept(config: Config, estimate: DiskEstimate) -> str:
    """Returns the number of checkpoints at once, as text."""
    checkpoint = config.checkpoint
    if not estimate.is_bounded:
        reason = (
            f"checkpoint.keep_every={checkpoint.keep_every} keeps its multiples"
            if checkpoint.keep_last
            else "checkpoint.keep_last=0 keeps all"
        )
        return (
            f"one every {checkpoint.save_every} steps, and the number of steps depends on the "
            f"data; {reason}"
        )
    return f"{estimate.num_kept} at once" if estimate.num_kept > 1 else "one"


def unbounded_warning(config: Config, estimate: DiskEstimate) -> str:
    """Returns the warning about checkpoints whose number is unknown."""
    hint = (
        "set checkpoint.keep_every=0"
        if config.checkpoint.keep_last
        else "checkpoint.keep_last=3 keeps the newest three"
    )
    return (
        "the number of checkpoints depends on the number of steps, which only the data determine: "
        f"{format_bytes(estimate.free_bytes)} of free space hold "
        f"{estimate.free_bytes // estimate.checkpoint_bytes:,} of "
        f"{format_bytes(estimate.checkpoint_bytes)}; {hint}"
    )


def check_free_space(config: Config, estimate: DiskEstimate) -> None:
    """Raises ConfigError if the checkpoints do not fit, with the number that fits."""
    if estimate.needed_bytes <= estimate.free_bytes:
        return
    kept = estimate.num_kept
    fitting = estimate.free_bytes // estimate.checkpoint_bytes + estimate.num_existing - 1
    can_keep = 1 <= fitting < kept
    raise ConfigError(
        "run.output_dir",
        config.run.output_dir,
        f"has {format_bytes(estimate.free_bytes)} free at {estimate.folder}, and {kept} "
        f"checkpoints of {format_bytes(estimate.checkpoint_bytes)} need "
        f"{format_bytes(estimate.needed_bytes)} more",
        f"keep {fitting}, or use another disk" if can_keep else "use another disk",
        fix={"checkpoint.keep_last": fitting} if can_keep else {"run.output_dir": "/a/larger/disk"},
    )
