"""A Megatron-LM checkpoint of one file a rank, as its tensor ranks' parts of the whole model under one set of names.

    iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt        TT tensor rank, PPP pipeline rank
      args, checkpoint_version, model (or model0, model1, ... with virtual pipeline stages), optimizer, ...

Each stage numbers its layers from 0, and there have been several sets of names: of the `language_model`, of the core with norms of
their own, of the core with norms inside the linears that follow them. All become the second one, layers numbered through.
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
    """Stands in for an object of a checkpoint that is no tensor and not needed; keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_IGNORED = [
    *[
        f"megatron.{place}.{name}"
        for place in ("core.enums", "model.enums", "enums")
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
"""What Megatron-LM's own files hold beside tensors and args: enumerations, numpy's random state, settings of fp8."""


class RankShard(Protocol):
    """What one tensor rank holds of the model, under the common names."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def view(self, name: str) -> Tensor:
        """The tensor, not to be written to."""

    def let_go(self, name: str) -> None:
        """Give back what a view has taken of memory."""


class MappedShard:
    """The tensors of files that are mapped."""

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

    def let_go(self, name: str) -> None:
        release(self._tensors[name])


class Ranks(NamedTuple):
    """The model on each tensor rank, the training arguments if there are any, and how the folder is laid out, in words."""

    folder: Path
    parts: list[RankShard]
    args: Namespace | None
    layout: str


def find_iteration(path: Path) -> Path | None:
    """The folder of the rank folders: the path itself, or the newest iteration that its tracker file names; None when it is neither."""
    if (
        any(_FOLDER.fullmatch(child.name) for child in path.iterdir())
        or (path / ".metadata").is_file()
    ):
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    word = tracker.read_bytes()[:100].decode("utf-8", errors="replace").strip()
    if word != "release" and not re.fullmatch(r"\d{1,9}", word, re.ASCII):
        raise CheckpointError(f"{tracker} names no iteration: {word!r}")
    folder = path / ("release" if word == "release" else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker} names {folder.name}, which is not there")
    return folder


def read_ranks(folder: Path) -> Ranks:
    """All ranks' files, their tensors mapped and none of them read."""
    files = _rank_files(folder)
    tensor, pipeline = 1 + max(t for t, _ in files), 1 + max(p for _, p in files)
    for place in ((t, p) for p in range(pipeline) for t in range(tensor)):
        if place not in files:
            raise CheckpointError(
                f"{folder} lacks tensor rank {place[0]} of pipeline rank {place[1]}, of {tensor} x {pipeline} ranks"
            )
    args: Namespace | None = None
    parts: list[RankShard] = []
    for t in range(tensor):
        stages = []
        for p in range(pipeline):
            state = load_state(files[t, p])
            found = read_namespace(state, files[t, p])
            args = args or found
            stages.append(_chunks(state, files[t, p]))
        parts.append(MappedShard(_number_through(stages, folder)))
    _check_degrees(args, tensor, pipeline, folder)
    return Ranks(folder, parts, args, f"tensor {tensor} x pipeline {pipeline} ranks")


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    files: dict[tuple[int, int], Path] = {}
    for child in sorted(folder.iterdir()):
        if not child.name.startswith("mp_rank_"):
            continue
        match = _FOLDER.fullmatch(child.name)
        if match is None:
            raise CheckpointError(
                f"{child} is of a layout that is not read (experts have ranks of their own); mp_rank_TT or mp_rank_TT_PPP is"
            )
        path = next((child / name for name in _FILES if (child / name).is_file()), None)
        if path is None:
            raise CheckpointError(f"{child} holds neither {' nor '.join(_FILES)}")
        files[int(match[1]), int(match[2] or 0)] = path
    return files


def load_state(path: Path) -> dict[str, Any]:
    """What one of Megatron-LM's own files holds; its tensors mapped, its enumerations and random states left out."""
    if not zipfile.is_zipfile(path):  # which alone can be mapped
        raise CheckpointError(
            f"{path} is damaged, or was written by torch before 1.6; load and save it once with a newer one"
        )
    state = load_without_code(path, [Namespace, *((InertObject, name) for name in _IGNORED)])
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__} and no checkpoint of Megatron-LM"
        )
    return state


def read_namespace(state: dict[str, Any], path: Path) -> Namespace | None:
    """The training arguments, if they are there; refuses a version of old."""
    version = state.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2:
        raise CheckpointError(
            f"{path} is of checkpoint_version {version}, which orders query, key and value otherwise; "
            "load and save it once with a newer Megatron-LM"
        )
    args = state.get("args")
    if args is not None and not isinstance(args, Namespace):
        raise CheckpointError(f"{path} has args that are a {type(args).__name__} and no Namespace")
    return args


def _chunks(state: dict[str, Any], path: Path) -> list[dict[str, Tensor]]:
    """The virtual stages of one file, under the common names."""
    if "model" in state:
        return [_named(state["model"], path)]
    numbers = [f"model{number}" for number in range(len(state)) if f"model{number}" in state]
    if not numbers:
        raise CheckpointError(f"{path} holds no model")
    return [_named(state[name], path) for name in numbers]


def _named(model: Any, path: Path) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}

    def walk(prefix: str, value: Any, depth: int) -> None:
        if isinstance(value, dict) and depth < 6:
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else str(name), inner, depth + 1)
        elif isinstance(value, Tensor):
            if not is_plain(value):
                raise CheckpointError(f"{path} holds {prefix[:120]}, which is not a plain tensor")
            name = common_name(prefix)
            if name is not None:
                flat[name] = value.detach()
        elif value is not None and not isinstance(value, InertObject):
            raise CheckpointError(
                f"{path} holds {prefix[:120]}, which is a {type(value).__name__} and no tensor"
            )

    walk("", model, 0)
    return flat


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
    """The name in the core's set with norms of their own; None for what is no parameter."""
    if name.endswith("_extra_state") or name.endswith("rotary_pos_emb.inv_freq"):
        return None
    for pattern, common in _RENAMED:
        name = re.sub(rf"^(?:{pattern})$", common, name)
    return name


def _number_through(stages: list[list[dict[str, Tensor]]], folder: Path) -> dict[str, Tensor]:
    """Stages by pipeline rank and chunk, whose layers count from 0, as one model: chunk by chunk, in each rank by rank."""
    whole: dict[str, Tensor] = {}
    before = 0
    if len({len(chunks) for chunks in stages}) != 1:
        raise CheckpointError(f"{folder} has pipeline ranks of different numbers of virtual stages")
    for stage in (chunks[number] for number in range(len(stages[0])) for chunks in stages):
        layers = {
            int(match[1])
            for name in stage
            if (match := re.match(r"decoder\.layers\.(\d{1,6})\.", name))
        }
        if layers != set(range(len(layers))):
            raise CheckpointError(
                f"{folder} has a stage with layers {sorted(layers)[:8]}, which do not count from 0"
            )
        for name, tensor in stage.items():
            moved = _moved(name, before)
            if moved in whole:
                raise CheckpointError(f"{folder} holds {moved} on two stages")
            whole[moved] = tensor
        before += len(layers)
    return whole


def _moved(name: str, layers: int) -> str:
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    return (
        name if match is None else f"decoder.layers.{int(match[1]) + layers}.{name[match.end() :]}"
    )


def _check_degrees(args: Namespace | None, tensor: int, pipeline: int, folder: Path) -> None:
    for name, found in (
        ("tensor_model_parallel_size", tensor),
        ("pipeline_model_parallel_size", pipeline),
    ):
        told = getattr(args, name, found)
        if told != found:
            raise CheckpointError(
                f"{folder} holds {found} ranks where its args say {name}={told}: some are missing"
            )
