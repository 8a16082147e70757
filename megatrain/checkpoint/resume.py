"""Resuming a run from a checkpoint.

A resume is bit-exact on the layout that wrote the checkpoint, and exact up to rounding on others.
Layout, ZeRO stage, schedule, offloading and dtype may change. Changes of the model, the update rule
and whatever determines the order of samples are refused, since the run would become another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.checkpoint import manifest, retention
from megatrain.checkpoint.optimizer_state import OptimizerState
from megatrain.checkpoint.train_state import (
    RunDescription,
    TrainState,
    read_train_state,
    train_state_path,
)
from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.mesh import ProcessMesh
from megatrain.errors import CheckpointError, format_value
from megatrain.models.config import differences
from megatrain.optim.zero import ZeroOptimizer


def choose_start(
    output_dir: Path | str,
    *,
    resume: str,
    init_from: str | None,
    has_adapters: bool = False,
    hashes: bool = False,
) -> tuple[Path | None, str]:
    """Returns the checkpoint to resume from, None for a new start, and a sentence that explains it.

    Args:
        output_dir: the run folder.
        resume: the setting `checkpoint.resume`: `auto`, `never` or a checkpoint's folder.
        init_from: the setting `train.init_from`.
        has_adapters: True for a LoRA run, which reads the base model at a resume too.
        hashes: with `auto`, also compare the contents of files with their hashes.

    Raises:
        CheckpointError: the named checkpoint is missing or incomplete.
    """
    folder = Path(output_dir) / "checkpoints"
    origin = "starting from scratch" if init_from is None else f"starting from {init_from}"
    unread = ""
    if init_from is not None and not has_adapters:
        unread = f"; train.init_from={init_from} is not read again"
    if resume == "never":
        return None, f"checkpoint.resume=never; {origin}{_describe_later(folder, step=0)}"
    if resume == "auto":
        newest, skipped = manifest.find_newest(folder, hashes=hashes)
        reasons = "".join(f"; skipped: {reason}" for reason in skipped)
        if newest is None:
            return None, f"no complete checkpoint in {folder}; {origin}{reasons}"
        return newest, f"resuming from {newest}, the newest complete checkpoint{reasons}{unread}"
    path = Path(resume)
    _check_named(path, resume)
    later = _describe_later(folder, step=read_train_state(path).state.step)
    return path, f"resuming from {path}, as checkpoint.resume requests{unread}{later}"


def _check_named(path: Path, resume: str) -> None:
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint.resume={resume} is not a folder; use a checkpoint's folder, `auto` or "
            "`never`",
            fix={"checkpoint.resume": "auto"},
        )
    problem = manifest.find_problem(path, hashes=True)
    if problem is not None:
        folders = (path / "checkpoints", path)
        found = [found for folder in folders for found in retention.list_checkpoints(folder)]
        newest = max(found, default=None)
        hint = "use another checkpoint or `auto`"
        if newest is not None:
            hint = f"use one of the run's checkpoints, such as {newest}"
        raise CheckpointError(
            f"checkpoint.resume={resume} {problem}; {hint}",
            fix={"checkpoint.resume": "auto" if newest is None else str(newest)},
        )


def _describe_later(folder: Path, *, step: int) -> str:
    """Returns a warning about checkpoints after `step`, which `auto` would resume from."""
    newest = max(retention.list_checkpoints(folder), default=None)
    if newest is None or retention.step_number(newest) <= step:
        return ""
    return (
        f"; {newest} is of a later step and checkpoint.resume=auto would resume from it: move it "
        "away or set another run.output_dir"
    )


def check(path: Path, run: RunDescription) -> None:
    """Raises CheckpointError unless the run may resume from a checkpoint.

    Model, task, adapters and update rule must be those of the checkpoint, and the same samples
    must follow. Needs no other ranks.
    """
    stored = read_train_state(path).run
    check_adapter(path, task=run.config["task"], lora=run.config["lora"])
    for name, old, new in differences(stored.model, run.model)[:1]:
        hint, fix = _use_another_folder(run.config)
        raise CheckpointError(
            f"{path} is of another model: its {name} is {format_value(old)} and the run's is "
            f"{format_value(new)}; {hint}",
            fix=fix,
        )
    for section, name, reason in _FIXED:
        setting, new = f"{section}.{name}", run.config[section][name]
        old = stored.config[section].get(name, new)  # a converted checkpoint has no settings
        if old != new:
            raise _changed(path, setting, old, new, reason)


def _changed(path: Path, setting: str, old: Any, new: Any, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was written with {setting}={format_value(old)} and this run has "
        f"{format_value(new)}: {reason}; set {setting}={format_value(old)}, or start a new run "
        f"from its weights with train.init_from={path}",
        fix={setting: old},
    )


_FIXED = [
    ("optimizer", "name", "update rules do not share their moments"),
    ("train", "global_batch_size", "step and batch size determine the next samples"),
    ("data", "sequence_length", "it determines the tokens of a sample"),
    ("run", "seed", "it determines the order of samples"),
]


def _use_another_folder(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns hint and fix for a checkpoint that is not the run's."""
    if config["checkpoint"]["resume"] != "auto":
        fix = {"checkpoint.resume": "never"}
        return "use one of this model, or start without any: checkpoint.resume=never", fix
    output_dir, number = config["run"]["output_dir"], 2
    while Path(f"{output_dir}-{number}").exists():
        number += 1
    unused = f"{output_dir}-{number}"
    hint = f"it is in the run's folder: use another, such as run.output_dir={unused}"
    return hint, {"run.output_dir": unused}


def load(
    path: Path, *, optimizer: ZeroOptimizer, global_batch_size: int, mesh: ProcessMesh
) -> TrainState:
    """Loads this rank's masters, moments and weights; all ranks call it together.

    Returns the run's state. Raises CheckpointError if the checkpoint does not fit the model.
    """
    state = read_train_state(path).state
    stored = OptimizerState(path / "optimizer")
    loaded = set()
    for fragment in optimizer.state.fragments():
        stored.load(fragment)
        loaded.add(fragment.sharding.name)
    unused = stored.names().difference(*gather_objects(loaded, mesh.world))
    if unused:
        raise CheckpointError(
            f"{stored.folder} contains {min(unused)}, which is not a parameter of this model"
        )
    optimizer.state.updates = state.updates
    optimizer.loss_scaling = state.loss_scaling
    optimizer.state.copy_masters_to_weights()
    return state if state.samples >= 0 else state._replace(samples=state.step * global_batch_size)


def describe_differences(path: Path, run: RunDescription) -> list[str]:
    """Returns a sentence on each change since the checkpoint that a resume allows."""
    stored = read_train_state(path).run
    found = []
    moved = [
        f"{name} {stored.layout[name]} -> {value}"
        for name, value in run.layout.items()
        if stored.layout.get(name, value) != value
    ]
    if moved:
        found.append(f"resuming on another layout, equal up to rounding: {', '.join(moved)}")
    new = run.config["train"]["dtype"]
    old = stored.config["train"].get("dtype", new)
    if old != new:
        found.append(
            f"train.dtype changed from {old} to {new}: masters and moments are loaded exactly, "
            "weights are rounded again"
        )
    new = run.config["data"]["train"]
    old = stored.config["data"].get("train", new)
    if old != new:
        found.append(
            f"data.train changed from {old} to {new}: continuing at the same sample position"
        )
    return found


def check_adapter(path: Path, *, task: str, lora: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a checkpoint is of another task or other adapters.

    Its weights could fit nevertheless, with another meaning. `lora` is the section of the config.
    """
    stored_task, stored = _adapter_settings(path)
    if stored_task is not None and stored_task != task:  # a converted checkpoint has no task
        raise CheckpointError(
            f"{path} was written with task={stored_task} and this run has task={task}; start a new "
            "run, with another run.output_dir, from its weights with train.init_from",
            fix={"task": stored_task},
        )
    rank = lora["rank"]
    if bool(stored["rank"]) != bool(rank):
        kinds = ["full weights", "adapters"]
        raise CheckpointError(
            f"{path} contains {kinds[bool(stored['rank'])]} and this run, with lora.rank={rank}, "
            f"trains {kinds[bool(rank)]}; set lora.rank={stored['rank']}, or start another run",
            fix={"lora.rank": stored["rank"]},
        )
    if rank == 0:
        return
    for name in ("rank", "alpha", "targets", "rslora", "dora", "quantize"):
        default = "none" if name == "quantize" else None  # older checkpoints have no `quantize`
        old, new = stored.get(name, default), lora[name]
        if old != new:
            raise _changed(path, f"lora.{name}", old, new, "it determines the adapters")


def _adapter_settings(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Returns the task, if there is one, and the section `lora` of a checkpoint's config."""
    file = train_state_path(path)
    config = manifest.read_json(file).get("config")
    if isinstance(config, dict):
        lora = config.get("lora", {"rank": 0})
        if isinstance(lora, dict) and isinstance(lora.get("rank"), int):
            return config.get("task"), lora
    raise CheckpointError(f"{file} is damaged: its config has no readable section lora")
