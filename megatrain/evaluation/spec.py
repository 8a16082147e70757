"""The specification of an evaluation: model, data, method and settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatrain.checkpoint import manifest
from megatrain.checkpoint.retention import find_model_folder
from megatrain.checkpoint.train_state import train_state_path
from megatrain.config.loader import Config, apply_override, from_dict, has_tokenizer
from megatrain.config.validation import find_errors
from megatrain.distributed import device
from megatrain.errors import CheckpointError, ConfigError

Kind = Literal["perplexity", "choices", "classification", "harness"]

SETTINGS = (
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
"""The settings of an evaluation; all others are refused."""

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class EvalSpec(NamedTuple):
    """An evaluation.

    Attributes:
        window: tokens that the model sees at once.
        stride: tokens that each window after the first scores.
        field: the field with the text, in JSONL and parquet files.
        tasks: tasks of lm-evaluation-harness.
        include_path: folder with more tasks.
        limit: documents of each task.
        num_fewshot: examples before each question of a task.
    """

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


def model_folder(path: str) -> Path:
    """Returns the folder of a model; for a run its best checkpoint, else the newest complete one.

    Raises CheckpointError if it has no model, or only an adapter.
    """
    folder = find_model_folder(Path(path))
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} contains an adapter without its base model; "
            "`megatrain finetune CONFIG --merge` writes the merged model to RUN/merged",
            command="megatrain finetune CONFIG --merge",
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json; use a checkpoint, a Hugging Face folder or a run's folder"
        )
    return folder


def model_name(folder: Path) -> str:
    """Returns the name of a model: its folder's, with the run's before a checkpoint's."""
    path = folder.resolve()
    is_checkpoint = path.parent.name == "checkpoints"
    return f"{path.parents[1].name}-{path.name}" if is_checkpoint else path.name


def trained_length(folder: Path) -> int | None:
    """Returns the sequence length that a checkpoint was trained with; None if it has none."""
    file = train_state_path(folder)
    if not file.is_file():
        return None
    length = manifest.read_json(file).get("config", {}).get("data", {}).get("sequence_length")
    return length if isinstance(length, int) else None


def make_config(folder: Path, overrides: Sequence[str]) -> Config:
    """Returns the settings of an evaluation: defaults of the model, with `section.key=value`.

    Raises ConfigError for a setting that an evaluation does not use, or that is invalid.
    """
    raw: dict[str, Any] = {
        "run": {"output_dir": f"runs/evaluate/{model_name(folder)}"},
        "model": str(folder),
        "data": {"tokenizer": str(folder)} if has_tokenizer(str(folder)) else {},
        "train": {"micro_batch_size": 8, "dtype": _default_dtype(folder)},
    }
    for override in overrides:
        name, _, value = override.partition("=")
        if name not in SETTINGS:
            raise ConfigError(
                name,
                value,
                "is not supported by `megatrain evaluate`",
                f"supported: {', '.join(SETTINGS)}",
            )
        apply_override(raw, override)
    config = from_dict(raw)
    for error in find_errors(config):
        if error.setting in SETTINGS:
            raise error
    return config


def _default_dtype(folder: Path) -> str:
    """Returns the model's dtype; fp32 for fp16 on CPUs, which do not support it."""
    raw = manifest.read_json(folder / "config.json")
    name = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    dtype = _DTYPES.get(name, "fp32")
    return "fp32" if dtype == "fp16" and not device.has_gpu() else dtype


def describe_settings(spec: EvalSpec, config: Config, world_size: int) -> dict[str, Any]:
    """Returns all settings that the results may depend on, for the results file."""
    parallel = config.parallel
    return {
        "window": spec.window,
        "stride": spec.stride,
        "field": spec.field,
        "dtype": config.train.dtype,
        "tokenizer": config.data.tokenizer,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": config.data_size(world_size),
        "sequence": parallel.sequence,
        "micro_batch_size": config.train.micro_batch_size,
        "limit": spec.limit,
        "num_fewshot": spec.num_fewshot,
    }
