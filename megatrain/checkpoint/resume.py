"""Takes a run up again from a checkpoint: bit for bit on the layout that wrote it, to rounding on any other.

What a resume must not change is refused, since the run would no longer be the one that was begun: the model, the update rule,
and what decides which samples come next. Layout, ZeRO, schedule, offload and dtype may change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatrain.checkpoint import manifest, retention
from megatrain.checkpoint.optimizer_state import OptimizerState
from megatrain.checkpoint.train_state import (
    TrainState,
    TrainStateFile,
    describe_layout,
    read_train_state,
    train_state_path,
)
from megatrain.config.loader import Config
from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.mesh import ProcessMesh
from megatrain.errors import CheckpointError, format_value
from megatrain.models.config import TransformerConfig, differences
from megatrain.optim.zero import ZeroOptimizer


def choose_start(config: Config, *, hashes: bool = False) -> tuple[Path | None, str]:
    """The checkpoint that `checkpoint.resume` means, and a sentence on why; a named one must be there and whole.

    `hashes` has `auto` compare not only the sizes of files with those written but their content as well.
    """
    wish, folder, source = (
        config.checkpoint.resume,
        Path(config.run.output_dir) / "checkpoints",
        config.train.init_from,
    )
    afresh = "starting afresh" if source is None else f"starting from {source}"
    instead = (
        ""
        if source is None or config.lora.rank
        else f"; train.init_from={source} was where the run began and is not read again"
    )
    if wish == "never":
        return None, f"{afresh}: checkpoint.resume=never{_left_by_another(folder, after=0)}"
    if wish == "auto":
        newest, passed = manifest.find_newest(folder, hashes=hashes)
        words = "".join(f"; passed over: {text}" for text in passed)
        if newest is None:
            return None, f"{afresh}: no whole checkpoint in {folder}{words}"
        return newest, f"resuming from {newest}, the newest whole checkpoint{words}{instead}"
    path = Path(wish)
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint.resume={wish} is not a folder; give a checkpoint's folder, `auto` or `never`"
        )
    wrong = manifest.find_problem(path, hashes=True)
    if wrong is not None:
        newest = max(
            [*retention.list_checkpoints(path / "checkpoints"), *retention.list_checkpoints(path)],
            default=None,
        )
        way_out = (
            "choose another checkpoint or `auto`"
            if newest is None
            else f"name one of the run's checkpoints, such as {newest}"
        )
        raise CheckpointError(f"checkpoint.resume={wish} {wrong}; {way_out}")
    return (
        path,
        f"resuming from {path}, as checkpoint.resume names it{instead}{_left_by_another(folder, after=read_train_state(path).state.step)}",
    )


def _left_by_another(folder: Path, *, after: int) -> str:
    """What is said of checkpoints that lie ahead of where the run begins: `auto` would take one of them, not the run's own."""
    ahead = max(retention.list_checkpoints(folder), default=None)
    if ahead is None or retention.step_number(ahead) <= after:
        return ""
    return f"; {ahead} lies ahead, and checkpoint.resume=auto would go on from there: move it away, or give another run.output_dir"


def _another_folder(path: Path, config: Config) -> str:
    """What to do about a checkpoint that is not the run's."""
    output = config.run.output_dir
    if config.checkpoint.resume != "auto":
        return "name one of this model, or begin without any with checkpoint.resume=never"
    return (
        f"it is in the run's folder: give the run another, such as run.output_dir={_free(output)}"
    )


def _free(folder: str) -> str:
    """The folder's name with a number that is not taken."""
    number = 2
    while Path(f"{folder}-{number}").exists():
        number += 1
    return f"{folder}-{number}"


def check(path: Path, config: Config, architecture: TransformerConfig) -> None:
    """Refuse a checkpoint of another model or rule, or whose samples would not go on; needs no ranks."""
    trainer = read_train_state(path)
    check_adapter(path, config)
    for name, there, here in differences(trainer.model, architecture.config)[:1]:
        raise CheckpointError(
            f"{path} is of another model: its {name} is {format_value(there)} and the run's is {format_value(here)}; {_another_folder(path, config)}"
        )
    _check_same(path, config, trainer)


def load(path: Path, *, zero: ZeroOptimizer, config: Config, mesh: ProcessMesh) -> TrainState:
    """Fill masters, states and weights from the pieces that are this rank's; all ranks call it together."""
    trainer = read_train_state(path)
    folder = OptimizerState(path / "optimizer")
    wanted = set()
    for fragment in zero.fragments():
        folder.fill(fragment)
        wanted.add(fragment.sharding.name)
    unused = folder.names().difference(*gather_objects(wanted, mesh.world))
    if unused:
        raise CheckpointError(
            f"{folder.folder} holds {min(unused)}, which this run has no place for"
        )
    zero.updates = trainer.state.updates
    zero.loss_scaling = trainer.state.loss_scaling
    zero.copy_masters_to_weights()
    if trainer.state.samples < 0:
        return trainer.state._replace(samples=trainer.state.step * config.train.global_batch_size)
    return trainer.state


def _check_same(path: Path, config: Config, trainer: TrainStateFile) -> None:
    """Refuse settings that a resume must not change."""
    for section, name, why in _FIXED:
        here = getattr(getattr(config, section), name)
        there = trainer.config[section].get(name, here)  # a converted checkpoint binds no run
        if there != here:
            raise CheckpointError(
                f"{path} was written with {section}.{name}={format_value(there)} and this run has {format_value(here)}: {why}; set "
                f"{section}.{name}={format_value(there)}, or start a new run from its weights with train.init_from={path}"
            )


_FIXED = [
    ("optimizer", "name", "one rule's states mean nothing to another"),
    ("train", "global_batch_size", "which samples come next follows from the step and the batch"),
    ("data", "sequence_length", "which tokens are a sample follows from it"),
    ("run", "seed", "the order of samples follows from it"),
]


def describe_differences(path: Path, config: Config, mesh: ProcessMesh) -> list[str]:
    """What is not as it was when the checkpoint was written, in words for the user."""
    trainer = read_train_state(path)
    there, here = trainer.layout, describe_layout(config.parallel, data=mesh.data.size)
    found = []
    moved = [
        f"{name} {there[name]} -> {value}"
        for name, value in here.items()
        if there.get(name, value) != value
    ]
    if moved:
        found.append(f"resuming on another layout, equal up to rounding: {', '.join(moved)}")
    dtype = trainer.config["train"].get("dtype", config.train.dtype)
    if dtype != config.train.dtype:
        found.append(
            f"train.dtype was {dtype} and is {config.train.dtype}: fp32 masters and moments go on exactly, weights are rounded anew"
        )
    if trainer.config["data"].get("train", config.data.train) != config.data.train:
        found.append(
            f"data.train was {trainer.config['data'].get('train')} and is {config.data.train}: the order goes on at the same sample"
        )
    return found


def check_adapter(path: Path, config: Config) -> None:
    """Refuse a checkpoint of another task or of other adapters: its weights would fit, or not, and mean something else."""
    task, there = _adapter_settings(path)
    here = config.lora
    if task is not None and task != config.task:  # a converted checkpoint binds no run
        raise CheckpointError(
            f"{path} was written with task={task} and this run has task={config.task}; start a new run, with another run.output_dir, "
            "from its weights with train.init_from"
        )
    if bool(there["rank"]) != bool(here.rank):
        words = ["whole weights", "adapters"]
        raise CheckpointError(
            f"{path} holds {words[bool(there['rank'])]} and this run, with lora.rank={here.rank}, trains {words[bool(here.rank)]}; "
            f"set lora.rank={there['rank']}, or start another run"
        )
    for name in ("rank", "alpha", "targets", "rslora", "dora", "quantize") if here.rank else ():
        value = there.get(
            name, "none" if name == "quantize" else None
        )  # what was written before there was such a setting
        if value != getattr(here, name):
            raise CheckpointError(
                f"{path} was written with lora.{name}={format_value(value)} and this run has lora.{name}={format_value(getattr(here, name))}; "
                f"resume with lora.{name}={format_value(value)}, or start another run"
            )


def _adapter_settings(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The task, if it names one, and the `lora` section of the checkpoint's config."""
    content = manifest.read_json(train_state_path(path)).get("config")
    if isinstance(content, dict):
        lora = content.get("lora", {"rank": 0})
        if isinstance(lora, dict) and isinstance(lora.get("rank"), int):
            return content.get("task"), lora
    raise CheckpointError(
        f"{train_state_path(path)} is damaged: its config says nothing that can be read of lora"
    )
