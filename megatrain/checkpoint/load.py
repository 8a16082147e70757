"""Takes a run up again from a checkpoint, on the layout that wrote it, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatrain.checkpoint import manifest
from megatrain.checkpoint.save import Progress, layout
from megatrain.config import Config
from megatrain.errors import CheckpointError
from megatrain.models.architecture import Architecture
from megatrain.optim.zero import Zero
from megatrain.parallel.grid import Grid


def choose(config: Config) -> tuple[Path | None, str]:
    """The checkpoint that `train.resume` means, and a sentence on why; a named one must be there and whole."""
    wish, folder, source = config.train.resume, Path(config.run.output_dir) / "checkpoints", config.train.init_from
    afresh = "starting afresh" if source is None else f"starting from {source}"
    instead = "" if source is None else f"; train.init_from={source} was where the run began and is not read again"
    if wish == "never":
        return None, f"{afresh}: train.resume=never"
    if wish == "auto":
        newest, passed = manifest.find_newest(folder)
        words = "".join(f"; passed over: {text}" for text in passed)
        if newest is None:
            return None, f"{afresh}: no whole checkpoint in {folder}{words}"
        return newest, f"resuming from {newest}, the newest whole checkpoint{words}{instead}"
    path = Path(wish)
    if not path.is_dir():
        raise CheckpointError(f"train.resume={wish} is not a folder; give a checkpoint's folder, `auto` or `never`")
    wrong = manifest.problem(path, hashes=True)
    if wrong is not None:
        raise CheckpointError(f"train.resume={wish} {wrong}; choose another checkpoint or `auto`")
    return path, f"resuming from {path}, as train.resume names it{instead}"


def check(path: Path, config: Config, architecture: Architecture, *, data_size: int | None = None) -> None:
    """Refuse a checkpoint of another model; needs no ranks."""
    trainer = manifest.read_json(path / "trainer.json")
    ignored = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")
    ours = json.loads(json.dumps(architecture.config.to_dict(), default=str))
    for name in sorted(set(ours) | set(trainer["model"])):
        there, here = trainer["model"].get(name), ours.get(name)
        if name not in ignored and there != here:
            raise CheckpointError(f"{path} is of another model: its {name} is {there} and the run's is {here}")


def load(path: Path, *, zero: Zero, config: Config, grid: Grid) -> Progress:
    """Fill masters, states and weights from this rank's file; all ranks call it together."""
    trainer = manifest.read_json(path / "trainer.json")
    for name, here in layout(config, grid).items():
        there = trainer["layout"].get(name)
        if there != here:
            raise CheckpointError(f"{path} was written with {name}={there} and this run has {name}={here}; "
                                  f"resume with {name}={there}, or start another run")  # fmt: skip
    file = path / "optimizer" / f"rank-{grid.rank:05d}.safetensors"
    try:
        _fill(file, zero)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    zero.updates = trainer["updates"]
    zero.masters_to_weights()
    return Progress(trainer["step"], trainer["tokens"], trainer["updates"], trainer["bad_steps"])


@torch.no_grad()
def _fill(file: Path, zero: Zero) -> None:
    with safe_open(file, framework="pt") as source:
        index: dict[str, Any] = {entry["key"]: entry for entry in json.loads(source.metadata()["fragments"])}
        for fragment in zero.fragments():
            s = fragment.sharding
            key = f"{s.name}[{s.start}:{s.start + s.length}]"
            entry = index.pop(key, None)
            if entry is None or entry["fragment_start"] != fragment.start:
                raise CheckpointError(f"{file} does not hold this rank's share of {s.name}")
            held = {name.rpartition("/")[2] for name in source.keys() if name.startswith(f"{key}/")}  # noqa: SIM118
            if held != set(fragment.tensors):
                raise CheckpointError(f"{file} holds {sorted(held)} of {s.name} and this run keeps {sorted(fragment.tensors)}")
            for name, tensor in fragment.tensors.items():
                tensor.copy_(source.get_tensor(f"{key}/{name}"))
        if index:
            raise CheckpointError(f"{file} holds {next(iter(index))}, which this run has no place for")
