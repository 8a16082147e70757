"""A Megatron-LM checkpoint as a source: its tensors put together from tensor ranks, under Hugging Face's names.

By rank the fused linears hold, with G groups of queries on the rank and n queries to a group, each of head_dim rows,

    linear_qkv    | q ... q k v | q ... q k v | ...      G times (n + 2)
    linear_fc1    | gate | up |                          of this rank's features, where the MLP is gated
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatrain.checkpoint.tensor_io import Index
from megatrain.conversion.megatron_args import MegatronArgs
from megatrain.conversion.megatron_legacy import Ranks
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig


class WeightMapping(NamedTuple):
    """How a tensor of Hugging Face's is made: of which one of Megatron's, of which piece of it, and whether transposed."""

    name: str
    piece: str = "all"
    transposed: bool = False


_LLAMA = {
    "input_layernorm": ("input_layernorm", "all"),
    "post_attention_layernorm": ("pre_mlp_layernorm", "all"),
    "self_attn.q_proj": ("self_attention.linear_qkv", "query"),
    "self_attn.k_proj": ("self_attention.linear_qkv", "key"),
    "self_attn.v_proj": ("self_attention.linear_qkv", "value"),
    "self_attn.o_proj": ("self_attention.linear_proj", "all"),
    "self_attn.q_norm": ("self_attention.q_layernorm", "all"),
    "self_attn.k_norm": ("self_attention.k_layernorm", "all"),
    "mlp.gate_proj": ("mlp.linear_fc1", "gate"),
    "mlp.up_proj": ("mlp.linear_fc1", "up"),
    "mlp.down_proj": ("mlp.linear_fc2", "all"),
}
_GPT2 = {
    "ln_1": ("input_layernorm", "all"),
    "ln_2": ("pre_mlp_layernorm", "all"),
    "attn.c_attn": ("self_attention.linear_qkv", "query, key, value"),
    "attn.c_proj": ("self_attention.linear_proj", "all"),
    "mlp.c_fc": ("mlp.linear_fc1", "all"),
    "mlp.c_proj": ("mlp.linear_fc2", "all"),
}
_OUTSIDE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
    "transformer.wte.weight": "embedding.word_embeddings.weight",
    "transformer.wpe.weight": "embedding.position_embeddings.weight",
    "transformer.ln_f.weight": "decoder.final_layernorm.weight",
    "transformer.ln_f.bias": "decoder.final_layernorm.bias",
}
_LAYER = re.compile(r"(model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)")
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


def weight_mapping(name: str) -> WeightMapping | None:
    """Of a tensor of Hugging Face's; None for a name that Megatron-LM has nothing for."""
    if name in _OUTSIDE:
        return WeightMapping(_OUTSIDE[name])
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    gpt2 = match[1] == "transformer.h"
    found = (_GPT2 if gpt2 else _LLAMA).get(match[3])
    if found is None:
        return None
    return WeightMapping(
        f"decoder.layers.{match[2]}.{found[0]}.{match[4]}",
        found[1],
        gpt2 and match[4] == "weight" and not match[3].startswith("ln_"),
    )


def split_dim(name: str) -> int | None:
    """The dim along which tensor ranks hold parts of one of Megatron's tensors; None where each holds all of it."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return 1
    columns = (
        "linear_qkv.weight",
        "linear_qkv.bias",
        "linear_fc1.weight",
        "linear_fc1.bias",
        "word_embeddings.weight",
        "output_layer.weight",
    )
    return 0 if name.endswith(columns) else None


class MegatronCheckpoint:
    """The source. One tensor is put together at a time, and kept until another is asked for."""

    kind = "Megatron-LM checkpoint"
    own_code = "a decoder on Megatron-LM's tensors"

    def __init__(
        self,
        ranks: Ranks,
        settings: MegatronArgs,
        config: Any,
        *,
        extras: Path | None,
        note: str = "",
    ) -> None:
        self.ranks, self.settings, self.config, self.extras, self.note = (
            ranks,
            settings,
            config,
            extras,
            note,
        )
        self.folder = ranks.folder
        self.kind = f"{MegatronCheckpoint.kind} of {ranks.layout}"
        self._recipes: dict[str, WeightMapping] = {}
        self._last: tuple[str, Tensor] | None = None

    def adopt(self, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]) -> None:
        """Find each tensor of the model, and refuse a checkpoint that holds others or whose ranks disagree."""
        if self.config.model_type not in FAMILIES:
            raise CheckpointError(
                f"--config names a {self.config.model_type}, and of Megatron-LM's checkpoints {', '.join(FAMILIES)} are read"
            )
        held = [part.names() for part in self.ranks.parts]
        for number, names in enumerate(held):
            if names != held[0]:
                raise CheckpointError(
                    f"{self.folder} holds {min(names ^ held[0])} on some tensor ranks and not on rank {number if min(names ^ held[0]) in held[0] else 0}"
                )
        for name in expected:
            found = weight_mapping(name)
            if found is not None and found.name in held[0]:
                self._recipes[name] = found
        left = held[0] - {found.name for found in self._recipes.values()}
        if self.settings.tied and "output_layer.weight" in left:
            left.discard("output_layer.weight")
            self._check_equal("output_layer.weight", "embedding.word_embeddings.weight")
        if left:
            raise CheckpointError(
                f"{self.folder} holds {min(left)}, for which a {self.config.model_type} of its settings has no place"
            )
        for name in held[0]:
            self._check_shapes(name)

    def _check_equal(self, copy: str, original: str) -> None:
        for part in self.ranks.parts:
            if original not in part.names() or not torch.equal(
                part.view(copy), part.view(original)
            ):
                raise CheckpointError(
                    f"{self.folder} is of tied embeddings, and its last stage's copy of them has other values than the first stage's"
                )

    def _check_shapes(self, name: str) -> None:
        first, *others = self.ranks.parts
        shape = first.shape(name)
        for rank, other in enumerate(others, start=1):
            if other.shape(name) != shape or other.dtype(name) != first.dtype(name):
                raise CheckpointError(
                    f"{self.folder} holds {name} of shape {other.shape(name)} on tensor rank {rank} and {shape} on rank 0"
                )
            if split_dim(name) is None and not torch.equal(first.view(name), other.view(name)):
                raise CheckpointError(
                    f"{self.folder} holds {name} with other values on tensor rank {rank} than on rank 0, and all ranks hold the same of it"
                )
        if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
            s = self.settings
            rows = s.num_groups * (s.num_heads // s.num_groups + 2) * s.head_dim
            if s.num_groups % len(self.ranks.parts) or shape[0] * len(self.ranks.parts) != rows:
                raise CheckpointError(
                    f"{self.folder} holds {name} of {shape[0]} rows on each of {len(self.ranks.parts)} tensor ranks, and "
                    f"{s.num_heads} heads in {s.num_groups} groups of head_dim {s.head_dim} make {rows}"
                )
        if (
            self.settings.gated
            and name.endswith(("linear_fc1.weight", "linear_fc1.bias"))
            and shape[0] % 2
        ):
            raise CheckpointError(
                f"{self.folder} holds {name} of {shape[0]} rows, which are not gate and up of equal size"
            )

    def names(self) -> list[str]:
        return list(self._recipes)

    def shape(self, name: str) -> tuple[int, ...]:
        made, s = self._recipes[name], self.settings
        shape = list(self.ranks.parts[0].shape(made.name))
        dim = split_dim(made.name)
        if dim is not None:
            shape[dim] *= len(self.ranks.parts)
        rows = {
            "query": s.num_heads * s.head_dim,
            "key": s.num_groups * s.head_dim,
            "value": s.num_groups * s.head_dim,
            "gate": shape[0] // 2,
            "up": shape[0] // 2,
        }
        shape[0] = rows.get(made.piece, shape[0])
        if _of_vocabulary(made.name):
            shape[0] = min(shape[0], self.config.vocab_size)
        return tuple(reversed(shape) if made.transposed else shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.ranks.parts[0].dtype(self._recipes[name].name)

    def read(self, name: str, index: Index | None = None) -> Tensor:
        return self._whole(name)[index or ()].clone(memory_format=torch.contiguous_format)

    def _whole(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None
            made = self._recipes[name]
            parts = [part.view(made.name) for part in self.ranks.parts]
            whole = _PIECES[made.piece](parts, self.settings, split_dim(made.name))
            if _of_vocabulary(made.name):
                whole = whole[: self.config.vocab_size]
            self._last = (
                name,
                (whole.t() if made.transposed else whole).clone(
                    memory_format=torch.contiguous_format
                ),
            )
            for part in self.ranks.parts:
                part.let_go(made.name)
        return self._last[1]

    def own_logits(self, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
        """[B, S, V], from the ranks' tensors as they are, rounded to the dtype first."""
        from megatrain.conversion.megatron_model import MegatronModel

        return MegatronModel(self.ranks.parts, self.settings, dtype).logits(tokens)[
            ..., : self.config.vocab_size
        ]


def _of_vocabulary(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def _all(parts: list[Tensor], s: MegatronArgs, dim: int | None) -> Tensor:
    return parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)


def _of_groups(
    first: int, count: int
) -> Callable[[list[Tensor], MegatronArgs, int | None], Tensor]:
    """Heads [first, first + count) of each group, counted from the end where negative; count 0 takes all queries."""

    def take(parts: list[Tensor], s: MegatronArgs, dim: int | None) -> Tensor:
        queries = s.num_heads // s.num_groups
        start, number = (first, count) if count else (0, queries)
        pieces = []
        for part in parts:
            groups = part.view(-1, queries + 2, s.head_dim, *part.shape[1:])
            place = start if start >= 0 else queries + 2 + start
            pieces.append(groups[:, place : place + number].flatten(0, 2))
        return torch.cat(pieces)

    return take


def _half(number: int) -> Callable[[list[Tensor], MegatronArgs, int | None], Tensor]:
    return lambda parts, s, dim: torch.cat([part.chunk(2)[number] for part in parts])


_QUERY, _KEY, _VALUE = _of_groups(0, 0), _of_groups(-2, 1), _of_groups(-1, 1)
_PIECES: dict[str, Callable[[list[Tensor], MegatronArgs, int | None], Tensor]] = {
    "all": _all,
    "query": _QUERY,
    "key": _KEY,
    "value": _VALUE,
    "gate": _half(0),
    "up": _half(1),
    "query, key, value": lambda parts, s, dim: torch.cat(
        [take(parts, s, dim) for take in (_QUERY, _KEY, _VALUE)]
    ),
}
