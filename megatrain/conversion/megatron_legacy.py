"""Megatron-LM checkpoints of one file a rank, as shards of tensor ranks under one set of names.

    iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt        TT tensor rank, PPP pipeline rank
      args, checkpoint_version, model (model0, model1, ... with virtual pipeline stages), ...

Each stage numbers its layers from 0. There are several sets of names: those of the old
`language_model`, those of the core with separate norms, and those of the core with norms inside the
linears that follow them. All become the second set, with consecutive layer numbers.
"""

from __future__ import annotations

import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatrain.checkpoint.tensor_io import is_plain, load_without_code, release
from megatrain.errors import CheckpointError

_FOLDER = re.compile(r"mp_rank_(\d{2,3})(?:_(\d{3}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")


class InertObject:
    """Stand-in for an object of a checkpoint that is not needed; keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_IGNORED = [
    *[
        f"megatron.{module}.{name}"
        for module in ("core.enums", "model.enums", "enums")
        for name in ("ModelType", "Fp8Recipe", "PositionEmbeddingType")
    ],
    *[
        f"megatron.core.transformer.enums.{name}"
        for name in ("AttnBackend", "AttnMaskType", "LayerType", "AttnType", "CudaGraphScope")
    ],
    *[
        f"numpy{part}"
        for part in (
            ".core.multiarray._reconstruct",
            "._core.multiarray._reconstruct",
            ".ndarray",
            ".dtype",
        )
    ],
    "_io.BytesIO",
]
"""Objects in Megatron-LM's files that are not needed: enums, random states, fp8 settings."""


class RankShard(Protocol):
    """The tensors of one tensor rank, under the common names."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def view(self, name: str) -> Tensor:
        """Returns the tensor, which must not be modified."""

    def release(self, name: str) -> None:
        """Frees the memory that a view has taken."""


class MappedShard:
    """Tensors of memory-mapped files."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def view(self, name: str) -> Tensor:
        return self._tensors[name]

    def release(self, name: str) -> None:
        release(self._tensors[name])


class RankShards(NamedTuple):
    """A checkpoint by tensor ranks.

    Attributes:
        shards: the tensors of each tensor rank.
        args: the args of the training command, None if they are missing.
        layout: a description of the layout, for the user to read.
    """

    folder: Path
    shards: list[RankShard]
    args: Namespace | None
    layout: str


def find_iteration(path: Path) -> Path | None:
    """Returns the folder with the rank folders or .metadata: the path, or its newest iteration.

    Returns None if the path is not a Megatron-LM checkpoint.
    """
    has_ranks = any(_FOLDER.fullmatch(child.name) for child in path.iterdir())
    if has_ranks or (path / ".metadata").is_file():
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    content = tracker.read_bytes()[:100].decode("utf-8", errors="replace").strip()
    if content != "release" and not re.fullmatch(r"\d{1,9}", content, re.ASCII):
        raise CheckpointError(f"{tracker} contains {content!r}, which is not an iteration")
    folder = path / ("release" if content == "release" else f"iter_{int(content):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker} names {folder.name}, which is missing")
    return folder


def read_rank_files(folder: Path) -> RankShards:
    """Maps the files of all ranks into memory, without reading tensors."""
    files = _rank_files(folder)
    tensor_size, pipeline_size = 1 + max(t for t, _ in files), 1 + max(p for _, p in files)
    for p in range(pipeline_size):
        for t in range(tensor_size):
            if (t, p) not in files:
                raise CheckpointError(
                    f"{folder} lacks tensor rank {t} of pipeline rank {p} "
                    f"({tensor_size} x {pipeline_size} ranks)"
                )
    args: Namespace | None = None
    shards: list[RankShard] = []
    for t in range(tensor_size):
        stages = []
        for p in range(pipeline_size):
            state = load_state(files[t, p])
            stage_args = read_namespace(state, files[t, p])
            args = args or stage_args
            stages.append(_virtual_stages(state, files[t, p]))
        shards.append(MappedShard(_merge_stages(stages, folder)))
    _check_sizes(args, tensor_size, pipeline_size, folder)
    layout = f"tensor {tensor_size} x pipeline {pipeline_size} ranks"
    return RankShards(folder, shards, args, layout)


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    files: dict[tuple[int, int], Path] = {}
    for child in sorted(folder.iterdir()):
        if not child.name.startswith("mp_rank_"):
            continue
        match = _FOLDER.fullmatch(child.name)
        if match is None:
            raise CheckpointError(
                f"{child} is a folder of expert ranks, which are not supported "
                "(supported: mp_rank_TT, mp_rank_TT_PPP)"
            )
        path = next((child / name for name in _FILES if (child / name).is_file()), None)
        if path is None:
            raise CheckpointError(f"{child} contains neither {' nor '.join(_FILES)}")
        files[int(match[1]), int(match[2] or 0)] = path
    return files


def load_state(path: Path) -> dict[str, Any]:
    """Returns the content of one of Megatron-LM's files: tensors are mapped, enums are dropped."""
    if not zipfile.is_zipfile(path):  # the only format that can be mapped
        raise CheckpointError(
            f"{path} is damaged, or was written by torch before 1.6; load and save it with a newer "
            "torch"
        )
    state = load_without_code(path, [Namespace, *((InertObject, name) for name in _IGNORED)])
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} contains a {type(state).__name__}, not a checkpoint of Megatron-LM"
        )
    return state


def read_namespace(state: dict[str, Any], path: Path) -> Namespace | None:
    """Returns the args of the training command, None if they are missing."""
    version = state.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2:
        raise CheckpointError(
            f"{path} has checkpoint_version {version}, which orders query, key and value otherwise "
            "(supported: 2 and newer); load and save it with a newer Megatron-LM"
        )
    args = state.get("args")
    if args is not None and not isinstance(args, Namespace):
        raise CheckpointError(f"{path}: args must be a Namespace, not {type(args).__name__}")
    return args


def _virtual_stages(state: dict[str, Any], path: Path) -> list[dict[str, Tensor]]:
    """Returns the tensors of each virtual stage of a file, under the common names."""
    if "model" in state:
        return [_flatten(state["model"], path)]
    names = [f"model{number}" for number in range(len(state)) if f"model{number}" in state]
    if not names:
        raise CheckpointError(f"{path} contains no model")
    return [_flatten(state[name], path) for name in names]


def _flatten(model: Any, path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}

    def visit(prefix: str, value: Any, depth: int) -> None:
        if isinstance(value, dict) and depth < 6:
            for name, child in value.items():
                visit(f"{prefix}.{name}" if prefix else str(name), child, depth + 1)
        elif isinstance(value, Tensor):
            if not is_plain(value):
                raise CheckpointError(f"{path}: {prefix[:120]} is not a plain tensor")
            name = common_name(prefix)
            if name is not None:
                tensors[name] = value.detach()
        elif value is not None and not isinstance(value, InertObject):
            raise CheckpointError(
                f"{path}: {prefix[:120]} must be a tensor, not {type(value).__name__}"
            )

    visit("", model, 0)
    return tensors


_RENAMED = [
    (
        r"language_model\.embedding\.(word|position)_embeddings\.weight",
        r"embedding.\1_embeddings.weight",
    ),
    (r"language_model\.(?:encoder|transformer)\.(.*)", r"decoder.\1"),
    (
        r"language_model\.output_layer\.weight|word_embeddings_for_head\.weight|word_embeddings\.weight",
        "output_layer.weight",
    ),
    (r"decoder\.final_(?:norm|layernorm)\.(.*)", r"decoder.final_layernorm.\1"),
    (r"(.*\.layers\.\d+)\.attention\.(.*)", r"\1.self_attention.\2"),
    (r"(.*\.layers\.\d+)\.input_norm\.(.*)", r"\1.input_layernorm.\2"),
    (r"(.*\.layers\.\d+)\.post_attention_(?:norm|layernorm)\.(.*)", r"\1.pre_mlp_layernorm.\2"),
    (r"(.*)\.self_attention\.query_key_value\.(.*)", r"\1.self_attention.linear_qkv.\2"),
    (r"(.*)\.self_attention\.dense\.(.*)", r"\1.self_attention.linear_proj.\2"),
    (r"(.*)\.mlp\.dense_h_to_4h\.(.*)", r"\1.mlp.linear_fc1.\2"),
    (r"(.*)\.mlp\.dense_4h_to_h\.(.*)", r"\1.mlp.linear_fc2.\2"),
    (r"(.*)\.self_attention\.linear_qkv\.layer_norm_(weight|bias)", r"\1.input_layernorm.\2"),
    (r"(.*)\.mlp\.linear_fc1\.layer_norm_(weight|bias)", r"\1.pre_mlp_layernorm.\2"),
]


def common_name(name: str) -> str | None:
    """Returns the name in the core's set with separate norms; None if it is not a parameter."""
    if name.endswith("_extra_state") or name.endswith("rotary_pos_emb.inv_freq"):
        return None
    for pattern, common in _RENAMED:
        name = re.sub(rf"^(?:{pattern})$", common, name)
    return name


def _merge_stages(stages: list[list[dict[str, Tensor]]], folder: Path) -> dict[str, Tensor]:
    """Returns one model with consecutive layer numbers, from stages [pipeline rank][virtual stage].

    The layers of virtual stage 0 of all ranks come before those of virtual stage 1.
    """
    model: dict[str, Tensor] = {}
    num_layers = 0
    if len({len(rank_stages) for rank_stages in stages}) != 1:
        raise CheckpointError(
            f"{folder} has pipeline ranks with different numbers of virtual stages"
        )
    for stage in (stage for stages_of_all in zip(*stages, strict=True) for stage in stages_of_all):
        layers = {
            int(match[1])
            for name in stage
            if (match := re.match(r"decoder\.layers\.(\d{1,6})\.", name))
        }
        if layers != set(range(len(layers))):
            raise CheckpointError(
                f"{folder} has a stage with layers {sorted(layers)[:8]}, which do not count from 0"
            )
        for stage_name, tensor in stage.items():
            name = _shift_layer(stage_name, num_layers)
            if name in model:
                raise CheckpointError(f"{folder} contains {name} on two stages")
            model[name] = tensor
        num_layers += len(layers)
    return model


def _shift_layer(name: str, offset: int) -> str:
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    if match is None:
        return name
    return f"decoder.layers.{int(match[1]) + offset}.{name[match.end() :]}"


def _check_sizes(
    args: Namespace | None, tensor_size: int, pipeline_size: int, folder: Path
) -> None:
    found = {
        "tensor_model_parallel_size": tensor_size,
        "pipeline_model_parallel_size": pipeline_size,
    }
    for name, size in found.items():
        expected = getattr(args, name, size)
        if expected != size:
            raise CheckpointError(
                f"{folder} contains {size} ranks, but its args have {name}={expected}; "
                "ranks are missing"
            )
