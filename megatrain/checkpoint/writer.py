"""Writes a checkpoint: a Hugging Face folder with the optimizer's state beside it.

    step-00000100/
      config.json  generation_config.json  tokenizer files
      model-0000i-of-0000n.safetensors  model.safetensors.index.json      (one file: model.safetensors)
      optimizer/index.json  rank-00000.safetensors ...      masters and states, by tensor name and place
      train_state.json                       step, tokens, layout, the run's config
      manifest.json                          every file's size and hash

Nothing here speaks to other ranks: content.py gathers what a rank writes, saver.py agrees when all have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from megatrain.checkpoint import manifest, peft
from megatrain.checkpoint.hf_folder import shard_names, write_weight_map
from megatrain.checkpoint.optimizer_state import NamedFlatShard, write_index
from megatrain.checkpoint.snapshot import CheckpointShard
from megatrain.checkpoint.tensor_io import write_tensors
from megatrain.checkpoint.train_state import FILE_NAME, TrainState, describe_layout
from megatrain.config import loader as configuration
from megatrain.config.loader import Config
from megatrain.distributed.mesh import ProcessMesh
from megatrain.models.config import TransformerConfig

MAX_SHARD_BYTES = 5 * 10**9


class WrittenShard(NamedTuple):
    """What one rank wrote: its model shards in order with their tensors, its pieces of the optimizer, and all files."""

    stage: int
    shards: list[tuple[str, dict[str, int]]]
    pieces: list[NamedFlatShard]
    records: list[manifest.FileRecord]


def prepare(temporary: Path) -> None:
    """An empty folder to write to."""
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "optimizer").mkdir(parents=True)


def write_shard(
    temporary: Path, content: CheckpointShard, *, rank: int, stage: int
) -> WrittenShard:
    """Write a rank's tensors; no other rank is needed."""
    shards, records = [], []
    for number, tensors in enumerate(_cut(content.model)):
        name = f"stage-{stage:05d}-{number:05d}.safetensors"
        records.append(
            write_tensors(temporary / name, tensors, metadata={"format": "pt"}).record(temporary)
        )
        shards.append((name, {key: tensor.nbytes for key, tensor in tensors.items()}))
    if content.optimizer.pieces:
        path = temporary / "optimizer" / _optimizer_file(rank)
        records.append(write_tensors(path, content.optimizer.tensors).record(temporary))
    return WrittenShard(stage, shards, content.optimizer.pieces, records)


def _cut(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """In their order, in files of about MAX_SHARD_BYTES."""
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        held[name] = tensor
        if sum(t.nbytes for t in held.values()) >= MAX_SHARD_BYTES:
            yield held
            held = {}
    if held:
        yield held


def _optimizer_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_train_state(
    temporary: Path,
    progress: TrainState,
    *,
    config: Config,
    architecture: TransformerConfig,
    mesh: ProcessMesh,
) -> None:
    trainer = {
        **progress._asdict(),
        "layout": describe_layout(config.parallel, data=mesh.data.size),
        "config": configuration.to_dict(config),
        "model": architecture.config.to_dict(),
    }
    (temporary / FILE_NAME).write_text(json.dumps(trainer, indent=1, default=str), encoding="utf-8")


def commit(
    temporary: Path,
    final: Path,
    shares: list[WrittenShard],
    *,
    states: Iterable[str],
    config: Config,
    architecture: TransformerConfig,
) -> None:
    """Make what all ranks wrote a checkpoint: a model's or an adapter's names, indices, manifest, and the one rename."""
    renamed = _renamed(temporary, shares, states)
    if config.lora.rank:
        renamed = peft.join(temporary, renamed, config, architecture)
    records = {entry.path: entry for entry in renamed}
    for path in sorted(temporary.rglob("*")):
        name = str(path.relative_to(temporary))
        if path.is_file() and name not in records:
            records[name] = manifest.make_record(temporary, path)
    manifest.fsync_folder(temporary / "optimizer")
    manifest.commit(temporary, final, list(records.values()))


def _renamed(
    temporary: Path, shares: list[WrittenShard], states: Iterable[str]
) -> list[manifest.FileRecord]:
    """Give the shards Hugging Face's names and write the indices."""
    records = {entry.path: entry for share in shares for entry in share.records}
    shards = [shard for share in sorted(shares, key=lambda s: s.stage) for shard in share.shards]
    weight_map: dict[str, str] = {}
    for new, (old, sizes) in zip(shard_names(len(shards)), shards, strict=True):
        (temporary / old).rename(temporary / new)
        records[new] = records.pop(old)._replace(path=new)
        weight_map |= dict.fromkeys(sizes, new)
    pieces = {
        _optimizer_file(rank): share.pieces for rank, share in enumerate(shares) if share.pieces
    }
    write_index(temporary / "optimizer", pieces, states)
    if len(shards) > 1:
        write_weight_map(
            temporary,
            weight_map,
            total_size=sum(size for _, sizes in shards for size in sizes.values()),
        )
    return list(records.values())
