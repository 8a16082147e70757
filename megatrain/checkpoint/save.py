"""Writes a checkpoint: a Hugging Face folder with the optimizer's state beside it.

    step-00000100/
      config.json  generation_config.json  tokenizer files
      model-0000i-of-0000n.safetensors  model.safetensors.index.json      (one file: model.safetensors)
      optimizer/index.json  rank-00000.safetensors ...      masters and states, by tensor name and place
      trainer.json                           step, tokens, layout, the run's config
      manifest.json                          every file's size and hash

All ranks call `save` together. The first data rank of each stage gathers its tensors from its tensor ranks and writes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatrain import config as configuration
from megatrain.checkpoint import adapter, manifest
from megatrain.checkpoint.best import best_checkpoint
from megatrain.checkpoint.descriptions import Chat, write_descriptions
from megatrain.checkpoint.optimizer_folder import NamedPiece, snapshot, write_index, write_pieces
from megatrain.config import Config
from megatrain.errors import CheckpointError
from megatrain.models.architecture import Architecture
from megatrain.optim.zero import Zero
from megatrain.parallel.collectives import all_gather
from megatrain.parallel.grid import Grid
from megatrain.parallel.sharding import Sharding, parameters

MAX_SHARD_BYTES = 5 * 10**9


class Progress(NamedTuple):
    """Where a run stands, as trainer.json keeps it."""

    step: int
    tokens: int
    updates: int
    bad_steps: int = 0


def layout(config: Config, grid: Grid) -> dict[str, Any]:
    """What was split over which ranks; a resume is bit-exact where it is the same, and exact to rounding where it is not."""
    p = config.parallel
    return {"tensor": p.tensor, "pipeline": p.pipeline, "data": grid.data.size, "zero": p.zero, "sequence": p.sequence,
            "schedule": p.schedule, "offload": p.offload}  # fmt: skip


def save(folder: Path, progress: Progress, *, zero: Zero, config: Config, architecture: Architecture, grid: Grid,
         chat: Chat | None = None) -> Path:  # fmt: skip
    """Write `folder/step-NNNNNNNN` and return it. A failure on any rank is raised on all, and leaves nothing new."""
    final = folder / f"step-{progress.step:08d}"
    temporary = folder / f".writing-{final.name}"
    _together(lambda: _prepare(temporary) if grid.rank == 0 else None)
    shares = _together(lambda: _write_share(temporary, progress, zero, config, architecture, grid, chat))
    _together(lambda: manifest.commit(temporary, final, _files(temporary, shares, zero.states, config, architecture)) if grid.rank == 0 else None,
              cleanup=temporary if grid.rank == 0 else None)  # fmt: skip
    return final


def _together(work: Any, *, cleanup: Path | None = None) -> list[Any]:
    """Do the rank's work; when it failed on any rank, raise the first failure on all. Returns all ranks' results."""
    try:
        outcome: tuple[Any, str | None] = (work(), None)
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
        outcome = (None, f"rank {dist.get_rank()} could not write the checkpoint: {error}")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    failure = next((text for _, text in outcomes if text), None)
    if failure is not None:
        if cleanup is not None:
            shutil.rmtree(cleanup, ignore_errors=True)
        raise CheckpointError(f"{failure}; the checkpoints before it are as they were")
    return [result for result, _ in outcomes]


def _prepare(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "optimizer").mkdir(parents=True)


class _Share(NamedTuple):
    """What one rank wrote: its model shards in order with their tensors, its pieces of the optimizer, and all files."""

    stage: int
    shards: list[tuple[str, dict[str, int]]]
    pieces: list[NamedPiece]
    records: list[manifest.FileRecord]


def _write_share(temporary: Path, progress: Progress, zero: Zero, config: Config, architecture: Architecture, grid: Grid,
                 chat: Chat | None) -> _Share:  # fmt: skip
    try:
        written, pieces = _write_optimizer(temporary, zero, grid)
        shards = _write_model(temporary, zero, grid)
        if grid.rank == 0:
            written += _write_descriptions(temporary, progress, config, architecture, grid, chat)
        records = [manifest.record(temporary, path) for path in [*written, *(temporary / name for name, _ in shards)]]
    except (OSError, SafetensorError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _Share(grid.pipeline.rank, shards, pieces, records)


def optimizer_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write_optimizer(temporary: Path, zero: Zero, grid: Grid) -> tuple[list[Path], list[NamedPiece]]:
    """Without ZeRO all replicas hold the same, and the first writes it."""
    if zero.config.parallel.zero == 0 and grid.data.rank != 0:
        return [], []
    held = snapshot(zero.fragments())
    if not held.pieces:
        return [], []
    path = temporary / "optimizer" / optimizer_file(grid.rank)
    write_pieces(path, held)
    return [path], held.pieces


def _write_model(temporary: Path, zero: Zero, grid: Grid) -> list[tuple[str, dict[str, int]]]:
    """Gather each tensor of the stage on its first tensor rank and write shards there; returns (file, bytes by tensor)."""
    shards: list[tuple[str, dict[str, int]]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        if held:
            name = f"stage-{grid.pipeline.rank:05d}-{len(shards):05d}.safetensors"
            save_file(held, temporary / name, metadata={"format": "pt"})
            shards.append((name, {key: tensor.nbytes for key, tensor in held.items()}))
            held.clear()

    for name, tensor in _whole_tensors(zero, grid):
        held[name] = tensor
        if sum(t.nbytes for t in held.values()) >= MAX_SHARD_BYTES:
            flush()
    flush()
    return shards


def _whole_tensors(zero: Zero, grid: Grid) -> Iterator[tuple[str, Tensor]]:
    """Each whole tensor of this stage that is trained in turn, on tensor rank 0 of data rank 0; the other ranks only take part.

    A tensor that several parameters share (fused query, key, value) comes when the last of them was gathered.
    """
    if grid.data.rank != 0 and zero.config.parallel.zero != 3:
        return
    mine = [(declaration, parameter) for declaration, parameter in parameters(zero.stage) if parameter.requires_grad]
    declarations = _declarations([replace(declaration, summed=()) for declaration, _ in mine], grid)
    last = {declaration.name: index for index, (declaration, _) in enumerate(mine)}
    building: dict[str, Tensor] = {}
    for index, (declaration, parameter) in enumerate(mine):
        weights = zero.whole_weights(parameter)
        parts = all_gather(weights[None].contiguous(), grid.tensor)
        if grid.data.rank != 0 or grid.tensor.rank != 0 or not _written_here(declarations, index):
            continue
        if declaration.name not in building:
            building[declaration.name] = torch.empty(declaration.shape, dtype=weights.dtype)
        for their, part in zip(declarations, parts, strict=True):
            their[index].put(their[index].part_of(part).cpu(), building[declaration.name])
        if last[declaration.name] == index:
            yield declaration.name, building.pop(declaration.name)


def _written_here(declarations: list[list[Sharding]], index: int) -> bool:
    """A tensor is written by the stage that counts it; the other end's copy of a tied embedding is not."""
    return any(their[index].counted for their in declarations)


def _declarations(mine: list[Sharding], grid: Grid) -> list[list[Sharding]]:
    """The declarations of all tensor ranks, in rank order."""
    if grid.tensor.size == 1:
        return [mine]
    theirs: list[Any] = [None] * grid.tensor.size
    dist.all_gather_object(theirs, mine, group=grid.tensor.group)
    return theirs


def _write_descriptions(temporary: Path, progress: Progress, config: Config, architecture: Architecture, grid: Grid,
                        chat: Chat | None) -> list[Path]:  # fmt: skip
    before = set(temporary.iterdir())
    write_descriptions(temporary, config, architecture, chat)
    trainer = {**progress._asdict(), "layout": layout(config, grid), "config": configuration.to_dict(config),
               "model": architecture.config.to_dict()}  # fmt: skip
    (temporary / "trainer.json").write_text(json.dumps(trainer, indent=1, default=str), encoding="utf-8")
    return [path for path in temporary.iterdir() if path not in before and path.is_file() and not path.name.startswith("stage-")]


def _files(temporary: Path, shares: list[_Share], states: Iterable[str], config: Config, architecture: Architecture) -> list[manifest.FileRecord]:
    """All files under their final names: a model's, or an adapter's."""
    records = _renamed(temporary, shares, states)
    return adapter.join(temporary, records, config, architecture) if config.lora.rank else records


def _renamed(temporary: Path, shares: list[_Share], states: Iterable[str]) -> list[manifest.FileRecord]:
    """Give the shards Hugging Face's names and write the indices."""
    records = {entry.path: entry for share in shares for entry in share.records}
    shards = [shard for share in sorted(shares, key=lambda s: s.stage) for shard in share.shards]
    weight_map: dict[str, str] = {}
    for number, (old, sizes) in enumerate(shards, start=1):
        new = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (temporary / old).rename(temporary / new)
        records[new] = records.pop(old)._replace(path=new)
        weight_map |= dict.fromkeys(sizes, new)
    pieces = {optimizer_file(rank): share.pieces for rank, share in enumerate(shares) if share.pieces}
    written = write_index(temporary / "optimizer", pieces, states)
    records[str(written.relative_to(temporary))] = manifest.record(temporary, written)
    if len(shards) > 1:
        index = temporary / "model.safetensors.index.json"
        total = sum(size for _, sizes in shards for size in sizes.values())
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1), encoding="utf-8")
        records[index.name] = manifest.record(temporary, index)
    return list(records.values())


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints and the run's best; 0 keeps all."""
    best = best_checkpoint(folder.parent)
    if count > 0:
        for old in sorted(folder.glob("step-*"))[:-count]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)
