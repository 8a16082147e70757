"""How large a run's checkpoints are, how many lie on the disk at once, and whether they have room."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from megatrain.checkpoint import retention
from megatrain.config.loader import Config
from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig
from megatrain.models.counts import count_adapter_parameters, count_parameters
from megatrain.ops.dtypes import DTYPES
from megatrain.optim.param_groups import STATES


class DiskEstimate(NamedTuple):
    """Bytes of one checkpoint, how many there are at once at most, how many are there already, and what is free at `place`."""

    each: int
    most: int
    there: int
    place: Path
    free: int

    @property
    def needed(self) -> int:
        return self.each * max(1, self.most - self.there)


def estimate_disk(config: Config, architecture: TransformerConfig) -> DiskEstimate:
    """One more checkpoint than is kept: the oldest goes once the newest is whole."""
    folder = Path(config.run.output_dir)
    place = existing(folder)
    there = len(retention.list_checkpoints(folder / "checkpoints"))
    return DiskEstimate(
        checkpoint_bytes(config, architecture),
        _most(config),
        there,
        place,
        shutil.disk_usage(place).free,
    )


def checkpoint_bytes(config: Config, architecture: TransformerConfig) -> int:
    """Weights in the run's dtype, masters and states in fp32: of the adapters alone where there are any."""
    trained = (
        count_adapter_parameters(architecture, config.lora)
        if config.lora.rank
        else count_parameters(architecture)
    )
    return trained * (
        DTYPES[config.train.dtype].itemsize + 4 * (1 + len(STATES[config.optimizer.name]))
    )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())


def _most(config: Config) -> int:
    train = config.train
    if train.epochs is not None:  # only the data say how many steps that is
        return (
            config.checkpoint.keep_last + 1
            if config.checkpoint.keep_last and config.checkpoint.save_every
            else 1
        )
    saves = (
        max(1, -(-config.steps // config.checkpoint.save_every))
        if config.checkpoint.save_every
        else 1
    )
    kept = (
        config.checkpoint.keep_last
        + (config.stability.on_loss_spike == "rollback")
        + (config.steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0)
    )
    return min(saves, kept + 1) if config.checkpoint.keep_last else saves


def is_open(config: Config) -> bool:
    """Whether only the data say how many checkpoints are kept, since they say how many steps there are."""
    train = config.train
    return (
        train.epochs is not None
        and config.checkpoint.save_every > 0
        and (not config.checkpoint.keep_last or config.checkpoint.keep_every > 0)
    )


def kept_in_words(config: Config, room: DiskEstimate) -> str:
    """How many checkpoints there are to be at once."""
    if is_open(config):
        which = (
            f"checkpoint.keep_every={config.checkpoint.keep_every} keeps those of its multiples"
            if config.checkpoint.keep_last
            else "checkpoint.keep_last=0 keeps all"
        )
        return f"one each {config.checkpoint.save_every} steps, of a number of steps that the data say; {which}"
    return f"{room.most} at once" if room.most > 1 else "one"


def open_warning(config: Config, room: DiskEstimate) -> str:
    """What is said where nothing limits them."""
    way_out = (
        "leave checkpoint.keep_every out"
        if config.checkpoint.keep_last
        else "checkpoint.keep_last=3 keeps the newest three"
    )
    return (
        f"how many checkpoints the run keeps follows from its epochs' steps, which only the data say: {in_bytes(room.free)} free hold "
        f"{room.free // room.each:,} of {in_bytes(room.each)}; {way_out}"
    )


def check_free_space(config: Config, room: DiskEstimate) -> None:
    """Refuse what does not fit, with as many checkpoints as do."""
    if room.needed <= room.free:
        return
    fits = room.free // room.each + room.there - 1
    way_out = f"keep {fits}, or write elsewhere" if 1 <= fits < room.most else "write elsewhere"
    fix = (
        {"checkpoint.keep_last": fits}
        if 1 <= fits < room.most
        else {"run.output_dir": "/a/larger/disk"}
    )
    raise ConfigError(
        "run.output_dir",
        config.run.output_dir,
        f"has {in_bytes(room.free)} free at {room.place}, and {room.most} checkpoints of "
        f"{in_bytes(room.each)} take {in_bytes(room.needed)} more",
        way_out,
        fix=fix,
    )


def in_bytes(count: float) -> str:
    """As disks are sold: a GB is 1e9 bytes."""
    unit, size = next(
        (
            (unit, size)
            for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6))
            if count >= 0.9995 * size
        ),
        ("kB", 1e3),
    )
    return f"{count / size:,.3g} {unit}" if count < 1e15 else f"{count / 1e12:,.0f} TB"
