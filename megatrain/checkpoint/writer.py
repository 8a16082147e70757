"""Writes the files of a checkpoint: a Hugging Face folder plus the optimizer's state.

    step-00000100/
      config.json  generation_config.json  tokenizer files
      model-0000i-of-0000n.safetensors  model.safetensors.index.json   (one file: model.safetensors)
      optimizer/index.json  rank-00000.safetensors ...      masters and moments, by tensor and slice
      train_state.json                       step, tokens, layout, the run's config
      manifest.json                          every file's size and hash

Nothing here communicates: snapshot.py gathers the tensors that a rank writes, and checkpointer.py
agrees among the ranks when all are done.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megatrain.checkpoint import manifest, peft
from megatrain.checkpoint.hf_folder import shard_names, write_weight_map
from megatrain.checkpoint.optimizer_state import NamedFlatShard, write_index
from megatrain.checkpoint.snapshot import CheckpointShard
from megatrain.checkpoint.tensor_io import write_tensors
from megatrain.files import flush_to_disk

MAX_SHARD_BYTES = 5 * 10**9


class WrittenShard(NamedTuple):
    """The files that one rank wrote.

    Attributes:
        stage: its pipeline stage.
        shards: its model files in order, each with the bytes of its tensors by name.
        pieces: its pieces of the optimizer's state.
        records: all files, for the manifest.
    """

    stage: int
    shards: list[tuple[str, dict[str, int]]]
    pieces: list[NamedFlatShard]
    records: list[manifest.FileRecord]


def prepare(temporary: Path) -> None:
    """Creates an empty folder to write to."""
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "optimizer").mkdir(parents=True)


def write_shard(temporary: Path, shard: CheckpointShard, *, rank: int, stage: int) -> WrittenShard:
    """Writes a rank's tensors, independently of other ranks."""
    shards, records = [], []
    for number, tensors in enumerate(_split_by_size(shard.model)):
        name = f"stage-{stage:05d}-{number:05d}.safetensors"
        written = write_tensors(temporary / name, tensors, metadata={"format": "pt"})
        records.append(written.record(temporary))
        shards.append((name, {key: tensor.nbytes for key, tensor in tensors.items()}))
    if shard.optimizer.pieces:
        path = temporary / "optimizer" / _optimizer_file(rank)
        records.append(write_tensors(path, shard.optimizer.tensors).record(temporary))
    return WrittenShard(stage, shards, shard.optimizer.pieces, records)


def _split_by_size(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors in order, in files of about MAX_SHARD_BYTES."""
    file: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        file[name] = tensor
        if sum(t.nbytes for t in file.values()) >= MAX_SHARD_BYTES:
            yield file
            file = {}
    if file:
        yield file


def _optimizer_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def commit(
    temporary: Path,
    final: Path,
    shards: list[WrittenShard],
    *,
    states: Iterable[str],
    adapter_config: Mapping[str, Any] | None,
) -> None:
    """Turns the files of all ranks into a checkpoint: final names, indices, manifest, one rename.

    `states` names the tensors that the optimizer keeps of each weight. `adapter_config` makes the
    checkpoint a PEFT adapter folder.
    """
    renamed = _rename_shards(temporary, shards, states)
    if adapter_config is not None:
        renamed = peft.join_shards(temporary, renamed, adapter_config)
    records = {entry.path: entry for entry in renamed}
    for path in sorted(temporary.rglob("*")):
        name = str(path.relative_to(temporary))
        if path.is_file() and name not in records:
            records[name] = manifest.make_record(temporary, path)
    flush_to_disk(temporary / "optimizer")
    manifest.commit(temporary, final, list(records.values()))


def _rename_shards(
    temporary: Path, written: list[WrittenShard], states: Iterable[str]
) -> list[manifest.FileRecord]:
    """Gives model files Hugging Face's names and writes the indices; returns all records."""
    records = {entry.path: entry for shard in written for entry in shard.records}
    files = [file for shard in sorted(written, key=lambda s: s.stage) for file in shard.shards]
    weight_map: dict[str, str] = {}
    for new, (old, sizes) in zip(shard_names(len(files)), files, strict=True):
        (temporary / old).rename(temporary / new)
        records[new] = records.pop(old)._replace(path=new)
        weight_map |= dict.fromkeys(sizes, new)
    pieces = {
        _optimizer_file(rank): shard.pieces for rank, shard in enumerate(written) if shard.pieces
    }
    write_index(temporary / "optimizer", pieces, states)
    if len(files) > 1:
        total_size = sum(size for _, sizes in files for size in sizes.values())
        write_weight_map(temporary, weight_map, total_size=total_size)
    return list(records.values())
