"""What is evaluated, on what, and how: from the words of the command line to settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatrain.checkpoint import manifest
from megatrain.checkpoint.retention import find_model_folder
from megatrain.checkpoint.train_state import train_state_path
from megatrain.config import loader as configuration
from megatrain.config.loader import Config
from megatrain.distributed import device
from megatrain.errors import CheckpointError, ConfigError

Kind = Literal["perplexity", "choices", "classification", "harness"]

USED = (
    "run.output_dir",
    "run.name",
    "run.master_port",
    "run.hang_timeout",
    "run.verbose",
    "data.tokenizer",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.data",
    "parallel.sequence",
    "parallel.layers_per_stage",
    "train.micro_batch_size",
    "train.dtype",
)
"""The settings that an evaluation reads; any other is refused."""

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class EvalSpec(NamedTuple):
    """An evaluation. `tasks` are lm-evaluation-harness's, with the folder where it looks for them beside its own."""

    model: str
    data: tuple[str, ...]
    kind: Kind
    window: int
    stride: int
    field: str
    as_json: bool = False
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None


def model_folder(given: str) -> Path:
    """The folder of a model: itself, or of a run's folder the checkpoint that it calls its best, or else the newest whole one."""
    path = find_model_folder(Path(given))
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} holds adapters alone; `megatrain finetune CONFIG --merge` makes RUN/merged of them and their model"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{given} is no model: it has no config.json; give a checkpoint, a Hugging Face folder or a run's folder"
        )
    return path


def model_name(folder: Path) -> str:
    """What tells the model from others for a reader: the folder's name, and of a run's checkpoint its run's before it."""
    whole = folder.resolve()
    return (
        f"{whole.parents[1].name}-{whole.name}"
        if whole.parent.name == "checkpoints"
        else whole.name
    )


def trained_length(folder: Path) -> int | None:
    """The sequence length that a checkpoint of ours was trained with."""
    file = train_state_path(folder)
    length = (
        manifest.read_json(file).get("config", {}).get("data", {}).get("sequence_length")
        if file.is_file()
        else None
    )
    return length if isinstance(length, int) else None


def make_config(folder: Path, words: Sequence[str]) -> Config:
    """The settings of an evaluation: what the folder says, with `section.key=value` words laid over it."""
    raw: dict[str, Any] = {
        "run": {"output_dir": f"runs/evaluate/{model_name(folder)}"},
        "data": {},
        "parallel": {},
        "train": {"micro_batch_size": 8, "dtype": _own_dtype(folder)},
    }
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists():
        raw["data"]["tokenizer"] = str(folder)
    for word in words:
        name = word.partition("=")[0]
        if name not in USED:
            raise ConfigError(
                name,
                word.partition("=")[2],
                "is not read by `megatrain evaluate`",
                f"it reads {', '.join(USED)}",
            )
        configuration.apply_override(raw, word)
    config = configuration.from_dict(
        {**raw, "model": str(folder), "train": {**raw["train"], "steps": 0}}
    )
    train = dataclasses.replace(
        config.train, global_batch_size=config.train.micro_batch_size * (config.parallel.data or 1)
    )
    config = dataclasses.replace(
        config,
        train=train,
        data=dataclasses.replace(config.data, sequence_length=config.parallel.tensor),
    )
    configuration.check(config)
    return config


def _own_dtype(folder: Path) -> str:
    """The model's own, but fp32 for fp16 on CPUs, where it is not computed in."""
    raw = manifest.read_json(folder / "config.json")
    own = _DTYPES.get(
        str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch."), "fp32"
    )
    return "fp32" if own == "fp16" and not device.has_gpu() else own


def describe_settings(subject: EvalSpec, config: Config, world_size: int) -> dict[str, Any]:
    """What a figure may depend on, for the results file."""
    p = config.parallel
    return {
        "window": subject.window,
        "stride": subject.stride,
        "field": subject.field,
        "dtype": config.train.dtype,
        "tokenizer": config.data.tokenizer,
        "tensor": p.tensor,
        "pipeline": p.pipeline,
        "data": config.data_size(world_size),
        "sequence": p.sequence,
        "micro_batch_size": config.train.micro_batch_size,
        "limit": subject.limit,
        "num_fewshot": subject.num_fewshot,
    }
