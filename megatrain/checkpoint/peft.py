"""A LoRA run's checkpoint: a PEFT adapter folder, with the optimizer of the adapters alone beside it.

step-00000100/
  adapter_config.json  adapter_model.safetensors      what `peft` loads; the base model stays where it is
  optimizer/ ...  trainer.json  manifest.json          as in every checkpoint
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatrain.checkpoint import manifest
from megatrain.config.loader import Config
from megatrain.errors import CheckpointError, format_value
from megatrain.models.config import TransformerConfig
from megatrain.models.lora import linear_names

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


def write_config(folder: Path, config: Config, architecture: TransformerConfig) -> None:
    """Write adapter_config.json in PEFT's words."""
    lora = config.lora
    targets = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    if lora.targets == "all-linear":
        targets = list(
            dict.fromkeys(name.rpartition(".")[2] for name in linear_names(architecture))
        )
    classifier = architecture.classifier
    kind = "CAUSAL_LM" if classifier is None else "TOKEN_CLS" if classifier.of_tokens else "SEQ_CLS"
    base = None if config.train.init_from is None else str(Path(config.train.init_from).resolve())
    said = {
        "peft_type": "LORA",
        "task_type": kind,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "fan_in_fan_out": architecture.transposed,
        "modules_to_save": None if classifier is None else [classifier.name],
    }
    (folder / CONFIG).write_text(json.dumps(said, indent=2), encoding="utf-8")


def join(
    folder: Path,
    records: list[manifest.FileRecord],
    config: Config,
    architecture: TransformerConfig,
) -> list[manifest.FileRecord]:
    """Make of a model's shards, which hold adapters alone, the one file that PEFT expects, and say what it is; returns all files."""
    shards = [record.path for record in records if record.path.startswith("model")]
    tensors: dict[str, Tensor] = {}
    for name in (name for name in shards if name.endswith(".safetensors")):
        with safe_open(folder / name, framework="pt") as source:
            tensors |= {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    for path in folder.glob("model*.safetensors*"):  # the shards, and their index
        path.unlink()
    write_config(folder, config, architecture)
    kept = [record for record in records if record.path not in shards]
    return [*kept, *(manifest.record(folder, folder / name) for name in (CONFIG, MODEL))]


def check(path: Path, config: Config) -> None:
    """Refuse a checkpoint of another task or of other adapters: its weights would fit, or not, and mean something else."""
    task, there = _settings(path)
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


def _settings(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The task, if it names one, and the `lora` section of the checkpoint's config."""
    content = manifest.read_json(path / "trainer.json").get("config")
    if isinstance(content, dict):
        lora = content.get("lora", {"rank": 0})
        if isinstance(lora, dict) and isinstance(lora.get("rank"), int):
            return content.get("task"), lora
    raise CheckpointError(
        f"{path / 'trainer.json'} is damaged: its config says nothing that can be read of lora"
    )
