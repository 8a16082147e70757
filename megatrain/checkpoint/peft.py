"""Checkpoints of LoRA runs, as PEFT adapter folders, and merging adapters into their base model.

    step-00000100/
      adapter_config.json  adapter_model.safetensors      what `peft` loads, without the base model
      optimizer/ ...  train_state.json  manifest.json     as in every checkpoint

Merging works on files alone, one at a time, in fp32, and stores each tensor in its own dtype. W is
stored as [out, in], or as [in, out] if the adapter has fan_in_fan_out (GPT-2). The formula is in
`models/lora.py`. A classifier's own matrix, which was trained in full, replaces the language
model's head.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatrain.checkpoint import manifest, resume
from megatrain.checkpoint.hf_folder import HFFolder, shard_names, write_weight_map
from megatrain.checkpoint.train_state import STATE_FILES
from megatrain.config.schema import LoraConfig
from megatrain.errors import CheckpointError, ConfigError
from megatrain.models.config import TransformerConfig, load_hf_config, read_config
from megatrain.models.lora import PREFIX, linear_names

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


def make_adapter_config(
    lora: LoraConfig, architecture: TransformerConfig, *, init_from: str | None
) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`; `init_from` is the base model's folder."""
    targets = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    if lora.targets == "all-linear":
        names = (name.rpartition(".")[2] for name in linear_names(architecture))
        targets = list(dict.fromkeys(names))
    classifier = architecture.classifier
    task = "CAUSAL_LM" if classifier is None else "TOKEN_CLS" if classifier.of_tokens else "SEQ_CLS"
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None if init_from is None else str(Path(init_from).resolve()),
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


def join_shards(
    folder: Path, records: list[manifest.FileRecord], adapter_config: Mapping[str, Any]
) -> list[manifest.FileRecord]:
    """Turns model files, which contain adapters only, into PEFT's one file and its config.

    Returns the records of all files.
    """
    shards = [record.path for record in records if record.path.startswith("model")]
    tensors: dict[str, Tensor] = {}
    for name in (name for name in shards if name.endswith(".safetensors")):
        with safe_open(folder / name, framework="pt") as source:
            tensors |= {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    for path in folder.glob("model*.safetensors*"):  # the shards, and their index
        path.unlink()
    (folder / CONFIG).write_text(json.dumps(adapter_config, indent=2), encoding="utf-8")
    kept = [record for record in records if record.path not in shards]
    return [*kept, *(manifest.make_record(folder, folder / name) for name in (CONFIG, MODEL))]


class LoraWeights(NamedTuple):
    """One module's adapter: A [r, in], B [out, r], DoRA's magnitudes [out]."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


class Adapter:
    """The tensors of a PEFT adapter folder that a run wrote, in memory.

    Attributes:
        modules: adapters by the name of the linear layer in the base model.
        full: tensors that were trained in full, by their names in the model.

    Raises CheckpointError if a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = manifest.read_json(folder / CONFIG)
        try:
            rank, self.transposed = config["r"], config["fan_in_fan_out"]
            self.scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
            with safe_open(folder / MODEL, framework="pt") as source:
                tensors = {name: source.get_tensor(name).float() for name in source.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ZeroDivisionError) as error:
            raise self._unreadable(error) from None
        suffix = ".lora_A.weight"
        names = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
        prefixes = tuple(f"{name}.lora_" for name in names)
        self.full = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in tensors.items()
            if not name.startswith(prefixes)
        }
        try:
            self.modules = {
                name.removeprefix(PREFIX): LoraWeights(
                    tensors[f"{name}.lora_A.weight"],
                    tensors[f"{name}.lora_B.weight"],
                    tensors.get(f"{name}.lora_magnitude_vector"),
                )
                for name in names
            }
        except KeyError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} is not a readable adapter: {type(error).__name__} {error}"
        )

    def merge(self, weight: Tensor, lora: LoraWeights) -> Tensor:
        """Returns the weight with its adapter, in the weight's dtype and orientation."""
        merged = weight.float().t() if self.transposed else weight.float()
        merged = torch.addmm(merged, lora.b, lora.a, alpha=self.scale)
        if lora.magnitude is not None:
            merged = merged * (lora.magnitude / merged.norm(dim=1))[:, None]
        return (merged.t() if self.transposed else merged).to(weight.dtype).contiguous()


def merge_run(
    output_dir: Path | str, *, lora: LoraConfig, task: str, init_from: str | None, resume_from: str
) -> Path:
    """Merges the adapter of a run into its base model and returns the folder, RUN/merged.

    Args:
        output_dir: the run folder.
        lora: the section `lora` of the run's config.
        task: the run's task.
        init_from: the base model.
        resume_from: the setting `checkpoint.resume`; `auto` takes the newest checkpoint.

    Raises:
        ConfigError: the run has no adapter.
        CheckpointError: the run lacks a checkpoint, or it is of other adapters.
    """
    if lora.rank == 0:
        raise ConfigError(
            "lora.rank",
            0,
            "must be at least 1 to merge adapters",
            "checkpoints of this run are full models already",
        )
    assert init_from is not None, "validated with the config: adapters require a base model"
    path, reason = resume.choose_start(
        output_dir, resume=resume_from, init_from=init_from, has_adapters=True
    )
    if path is None:
        raise CheckpointError(f"{output_dir} has no checkpoint to merge ({reason})")
    resume.check_adapter(path, task=task, lora=dataclasses.asdict(lora))
    return merge_adapter(path, Path(init_from), Path(output_dir) / "merged")


@torch.no_grad()
def merge_adapter(adapter_folder: Path, base: Path, output: Path) -> Path:
    """Writes `output`: the base model's folder with the adapter merged into its weights.

    The folder appears complete or not at all. Raises CheckpointError if the adapter does not fit
    the base model or a file cannot be read or written.
    """
    adapter, tensors = Adapter(adapter_folder), HFFolder(base)
    modules = {_base_name(name, tensors): lora for name, lora in adapter.modules.items()}
    dropped = _head_names(base) if adapter.full else set()
    temporary = output.with_name(f"{manifest.TEMPORARY}{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_model(temporary, adapter, tensors, modules, dropped)
        # The config is the base's, as its weights' dtype is; other common files are the adapter's.
        _copy_metadata(base, temporary, but=("generation_config.json",) if adapter.full else ())
        _copy_metadata(
            adapter_folder, temporary, but=(CONFIG, "config.json", *STATE_FILES, "README.md")
        )
        if adapter.full:
            _write_classifier_config(adapter_folder, base, temporary)
        records = [manifest.make_record(temporary, path) for path in sorted(temporary.iterdir())]
        manifest.commit(temporary, output, records)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output} could not be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _copy_metadata(source: Path, target: Path, *, but: tuple[str, ...]) -> None:
    """Copies config, tokenizer and chat template: all files except those of tensors."""
    for path in source.iterdir():
        is_tensors = path.name.endswith((".safetensors", ".bin", ".index.json"))
        if path.is_file() and not is_tensors and path.name not in (manifest.MANIFEST, *but):
            shutil.copy(path, target / path.name)


def _base_name(module: str, tensors: HFFolder) -> str:
    """Returns the weight's name in the base's files, which may lack the prefix (GPT-2's do)."""
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if name in tensors:
            return name
    raise CheckpointError(
        f"{tensors.folder} lacks {module}.weight, which the adapter changes; check that the "
        "adapter was trained on this model"
    )


def _head_names(base: Path) -> set[str]:
    """Returns the names that the head of a language model can have in its files."""
    architecture = read_config(load_hf_config(str(base)))
    head = f"{architecture.names['head'].name}.weight"
    return {head, *(old for old, new in architecture.renamed_weights.items() if new == head)}


def _write_classifier_config(adapter_folder: Path, base: Path, target: Path) -> None:
    """Writes the adapter's config, which has the classes, with the dtype of the base's weights."""
    config, base_config = (
        manifest.read_json(folder / "config.json") for folder in (adapter_folder, base)
    )
    default = base_config.get("torch_dtype", config.get("dtype"))
    config["dtype"] = base_config.get("dtype", default)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_model(
    folder: Path,
    adapter: Adapter,
    tensors: HFFolder,
    modules: dict[str, LoraWeights],
    dropped: set[str],
) -> None:
    """Writes the base's files with merged weights; fully trained tensors go to the last one."""
    excluded = dropped | set(adapter.full)
    contents = [[name for name in file.names() if name not in excluded] for file in tensors.files]
    contents = [names for names in contents if names]
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, (file, names) in enumerate(zip(shard_names(len(contents)), contents, strict=True)):
        shard = {name: _merged(name, adapter, tensors, modules) for name in names}
        if number == len(contents) - 1:
            dtype = tensors.dtype(next(iter(modules)))
            shard |= {name: tensor.to(dtype) for name, tensor in adapter.full.items()}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total_size += sum(tensor.nbytes for tensor in shard.values())
    if len(contents) > 1:
        write_weight_map(folder, weight_map, total_size=total_size)


def _merged(
    name: str, adapter: Adapter, tensors: HFFolder, modules: dict[str, LoraWeights]
) -> Tensor:
    weight = tensors.read(name)
    if name not in modules:
        return weight
    lora = modules[name]
    outputs, inputs = weight.shape[::-1] if adapter.transposed else weight.shape
    if (lora.b.shape[0], lora.a.shape[1]) != (outputs, inputs):
        raise CheckpointError(
            f"{tensors.folder} contains {name} of shape {tuple(weight.shape)} and "
            f"{adapter.folder} is for [{lora.b.shape[0]}, {lora.a.shape[1]}]"
        )
    return adapter.merge(weight, lora)
