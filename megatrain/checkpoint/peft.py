"""A LoRA run's checkpoint: a PEFT adapter folder, with the optimizer of the adapters alone beside it.

step-00000100/
  adapter_config.json  adapter_model.safetensors      what `peft` loads; the base model stays where it is
  optimizer/ ...  train_state.json  manifest.json          as in every checkpoint
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatrain.checkpoint import manifest, resume
from megatrain.checkpoint.hf_folder import HFFolder, shard_names, write_weight_map
from megatrain.checkpoint.train_state import STATE_FILES
from megatrain.config.loader import Config
from megatrain.errors import CheckpointError, ConfigError
from megatrain.models.config import TransformerConfig, load_hf_config, read_config
from megatrain.models.lora import PREFIX, linear_names

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
    return [*kept, *(manifest.make_record(folder, folder / name) for name in (CONFIG, MODEL))]


class LoraWeights(NamedTuple):
    """One module's adapter: A [r, in], B [out, r], DoRA's magnitudes [out]."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


class Adapter:
    """A PEFT adapter folder of ours, read whole: adapters are small.

    Attributes:
        modules: by the name of the linear in the base model.
        whole: tensors that were trained themselves, by their names in the model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = manifest.read_json(folder / CONFIG)
        try:
            rank, self.transposed = config["r"], config["fan_in_fan_out"]
            self.scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
            with safe_open(folder / MODEL, framework="pt") as source:
                tensors = {name: source.get_tensor(name).float() for name in source.keys()}  # noqa: SIM118
            names = [
                name.removesuffix(".lora_A.weight")
                for name in tensors
                if name.endswith(".lora_A.weight")
            ]
            low = tuple(f"{name}.lora_" for name in names)
            self.whole = {
                name.removeprefix(PREFIX): tensor
                for name, tensor in tensors.items()
                if not name.startswith(low)
            }
            self.modules = {
                name.removeprefix(PREFIX): LoraWeights(
                    tensors[f"{name}.lora_A.weight"],
                    tensors[f"{name}.lora_B.weight"],
                    tensors.get(f"{name}.lora_magnitude_vector"),
                )
                for name in names
            }
        except (OSError, SafetensorError, KeyError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{folder} is no readable adapter: {type(error).__name__} {error}"
            ) from None

    def merged(self, weight: Tensor, low: LoraWeights) -> Tensor:
        """The weight with its adapter, in the weight's dtype and orientation."""
        wide = weight.float().t() if self.transposed else weight.float()
        wide = torch.addmm(wide, low.b, low.a, alpha=self.scale)
        if low.magnitude is not None:
            wide = wide * (low.magnitude / wide.norm(dim=1))[:, None]
        return (wide.t() if self.transposed else wide).to(weight.dtype).contiguous()


def merge_run(config: Config) -> Path:
    """Merge the adapter of a run's newest checkpoint, or of the one that `checkpoint.resume` names, into RUN/merged."""
    if config.lora.rank == 0:
        raise ConfigError(
            "lora.rank",
            0,
            "makes no adapter that could be merged",
            "the run's checkpoints are whole models as they are",
        )
    assert config.train.init_from is not None, "checked with the config"
    path, why = resume.choose_start(config)
    if path is None:
        raise CheckpointError(f"there is no checkpoint to merge ({why})")
    resume.check_adapter(path, config)
    return merge_adapter(path, Path(config.train.init_from), Path(config.run.output_dir) / "merged")


@torch.no_grad()
def merge_adapter(adapter_folder: Path, base: Path, output: Path) -> Path:
    """Write `output`, a Hugging Face folder of the base model with the adapter in its weights; it appears whole or not at all."""
    added, tensors = Adapter(adapter_folder), HFFolder(base)
    homes = {_in_base(name, tensors): low for name, low in added.modules.items()}
    left_out = _head_names(base) if added.whole else set()
    temporary = output.with_name(f"{manifest.TEMPORARY}{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_model(temporary, added, tensors, homes, left_out)
        # The config is the base's, as its weights' dtype is; what else both folders have is the adapter's.
        _copy_others(base, temporary, but=("generation_config.json",) if added.whole else ())
        _copy_others(
            adapter_folder, temporary, but=(CONFIG, "config.json", *STATE_FILES, "README.md")
        )
        if added.whole:
            _describe_classifier(adapter_folder, base, temporary)
        records = [manifest.make_record(temporary, path) for path in sorted(temporary.iterdir())]
        manifest.commit(temporary, output, records)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output} could not be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _copy_others(source: Path, target: Path, *, but: tuple[str, ...]) -> None:
    """Copy what is no tensors: config, tokenizer, chat template."""
    for path in source.iterdir():
        if (
            path.is_file()
            and path.name not in (manifest.MANIFEST, *but)
            and not path.name.endswith((".safetensors", ".bin", ".index.json"))
        ):
            shutil.copy(path, target / path.name)


def _in_base(module: str, tensors: HFFolder) -> str:
    """The weight's name in the base's files, which may leave out the first part of it (GPT-2's own do)."""
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if name in tensors:
            return name
    raise CheckpointError(
        f"{tensors.folder} holds no {module}.weight, which the adapter changes; is it the model that the adapter was trained on?"
    )


def _head_names(base: Path) -> set[str]:
    """What the head of a language model may be called in its files."""
    architecture = read_config(load_hf_config(str(base)))
    head = f"{architecture.names['head'].name}.weight"
    return {head, *(theirs for theirs, ours in architecture.former_names.items() if ours == head)}


def _describe_classifier(adapter_folder: Path, base: Path, target: Path) -> None:
    """The config is the adapter's, which knows the classes; the dtype is the base's, as its weights are."""
    config, theirs = (
        manifest.read_json(folder / "config.json") for folder in (adapter_folder, base)
    )
    config["dtype"] = theirs.get("dtype", theirs.get("torch_dtype", config.get("dtype")))
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_model(
    folder: Path,
    added: Adapter,
    tensors: HFFolder,
    homes: dict[str, LoraWeights],
    left_out: set[str],
) -> None:
    """In the base's files, but for one of which nothing is left; what is whole goes to the last."""
    contents = [
        names
        for file in tensors.files
        if (
            names := [
                name for name in file.names() if name not in left_out and name not in added.whole
            ]
        )
    ]
    weight_map: dict[str, str] = {}
    total = 0
    for number, (file, names) in enumerate(zip(shard_names(len(contents)), contents, strict=True)):
        shard = {name: _merged(name, added, tensors, homes) for name in names}
        if number == len(contents) - 1:
            dtype = tensors.dtype(next(iter(homes)))
            shard |= {name: tensor.to(dtype) for name, tensor in added.whole.items()}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(contents) > 1:
        write_weight_map(folder, weight_map, total_size=total)


def _merged(name: str, added: Adapter, tensors: HFFolder, homes: dict[str, LoraWeights]) -> Tensor:
    weight = tensors.read(name)
    if name not in homes:
        return weight
    low = homes[name]
    outputs, inputs = weight.shape[::-1] if added.transposed else weight.shape
    if (low.b.shape[0], low.a.shape[1]) != (outputs, inputs):
        raise CheckpointError(
            f"{tensors.folder} has {name} of shape {tuple(weight.shape)}, and {added.folder} is for [{low.b.shape[0]}, {low.a.shape[1]}]"
        )
    return added.merged(weight, low)
