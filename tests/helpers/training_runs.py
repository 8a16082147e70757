"""Training runs on ranks of the pool: data, rank functions and results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from megatrain.config import loader as configuration
from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.data.indexed_dataset import IndexedWriter
from megatrain.distributed.env import RankEnv
from megatrain.distributed.mesh import MeshAxis

VOCABULARY = 67


def merge_sections(raw: dict, sections: dict) -> dict:
    """Returns a config of nested mappings with the settings of `sections` in place of its own."""
    merged = {
        name: {**raw.get(name, {}), **content} if isinstance(content, dict) else content
        for name, content in sections.items()
    }
    return {**raw, **merged}


def write_tokens(
    prefix: Path, *, documents: int = 60, length: int = 40, below: int = VOCABULARY
) -> Path:
    """Writes a dataset of random tokens; returns its prefix."""
    with IndexedWriter(prefix, vocab_size=VOCABULARY) as writer:
        for document in np.random.default_rng(0).integers(0, below, (documents, length)):
            writer.add(document)
    return prefix


def laid_over(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config of nested mappings with settings by `section.key`."""
    sections = {
        name: dict(section) if isinstance(section, Mapping) else section
        for name, section in raw.items()
    }
    for name, value in settings.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    return sections


def checked(raw: Mapping[str, Any]) -> Config:
    config = configuration.from_dict(dict(raw))
    configuration.check(config)
    return config


def place(rank: int, world_size: int) -> RankEnv:
    """Returns a rank of this machine; its address is not used, as the group exists."""
    return RankEnv(rank, world_size, rank, world_size, "127.0.0.1", 29500)


def pretrain(rank: int, world_size: int, raw: Mapping[str, Any]) -> None:
    from megatrain.training.run import pretrain

    pretrain(checked(raw), place(rank, world_size))


def finetune(rank: int, world_size: int, raw: Mapping[str, Any]) -> None:
    from megatrain.training.run import finetune

    finetune(checked(raw), place(rank, world_size))


def microbatches(rows: Tensor, size: int, data: MeshAxis) -> list[Batch]:
    """Returns a data rank's microbatches of tokens [B, S + 1], each row a document."""
    position = torch.arange(rows.shape[1] - 1).expand(size, -1)
    return [
        Batch(r[:, :-1], r[:, 1:], position, torch.zeros_like(position))
        for r in rows.split(size)[data.rank :: data.size]
    ]


# -- what a run has left behind ------------------------------------------------------------------


def metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without times and memory."""
    timed = (
        "seconds",
        "tokens_per_second",
        "tflops_per_rank",
        "mfu",
        "checkpoint_blocking_seconds",
        "memory_gib",
    )
    return [
        {name: value for name, value in line.items() if name not in timed} for line in lines(run)
    ]


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path, *, after: int = 0) -> list[tuple[float, float]]:
    """Returns loss and gradient norm of each later step."""
    return [(line["loss"], line["grad_norm"]) for line in lines(run) if line["step"] > after]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Returns the bytes of all tensors of a checkpoint, weights and optimizer."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[f"{path.relative_to(checkpoint)}:{name}"] = (
                    file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
                )
    assert len(found) > 10
    return found


def assert_same_run(one: Path, other: Path, *, step: int = 6) -> None:
    """Checks that two runs have the same metrics, and the same bits in the checkpoint of `step`."""
    assert metrics(one) == metrics(other)
    first, second = (tensors(run / "checkpoints" / f"step-{step:08d}") for run in (one, other))
    assert first == second
