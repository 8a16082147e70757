"""A Megatron-LM checkpoint as a source: tensors merged over tensor ranks, under Hugging Face names.

Each rank has the rows of fused linears in this order. A group has n queries, a key and a value,
each of head_dim rows:

    linear_qkv    | q ... q k v | q ... q k v | ...      G groups of n + 2 heads
    linear_fc1    | gate | up |                          the rank's features, if the MLP is gated
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
from megatrain.conversion.megatron_legacy import RankShards
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig


class WeightMapping(NamedTuple):
    """The origin of a Hugging Face tensor.

    Attributes:
        name: the tensor of Megatron-LM.
        rows: its rows, a key of _ROWS.
        transposed: whether Hugging Face stores it transposed.
    """

    name: str
    rows: str = "all"
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
    """Returns the origin of a Hugging Face tensor; None if Megatron-LM has no such tensor."""
    if name in _OUTSIDE:
        return WeightMapping(_OUTSIDE[name])
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    is_gpt2 = match[1] == "transformer.h"
    origin = (_GPT2 if is_gpt2 else _LLAMA).get(match[3])
    if origin is None:
        return None
    return WeightMapping(
        f"decoder.layers.{match[2]}.{origin[0]}.{match[4]}",
        origin[1],
        is_gpt2 and match[4] == "weight" and not match[3].startswith("ln_"),
    )


def split_dim(name: str) -> int | None:
    """Returns the dimension that tensor ranks split; None for a tensor that all ranks hold."""
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
    """A Megatron-LM checkpoint. It merges one tensor at a time and keeps it until the next one."""

    kind = "Megatron-LM checkpoint"
    implementation = "a decoder on Megatron-LM's tensors"

    def __init__(
        self,
        ranks: RankShards,
        args: MegatronArgs,
        config: Any,
        *,
        metadata_folder: Path | None,
        note: str = "",
    ) -> None:
        self.folder, self.shards, self.args = ranks.folder, ranks.shards, args
        self.config, self.metadata_folder, self.note = config, metadata_folder, note
        self.kind = f"{MegatronCheckpoint.kind}, {ranks.layout}"
        self._mappings: dict[str, WeightMapping] = {}
        self._cached: tuple[str, Tensor] | None = None

    def bind(self, architecture: TransformerConfig, expected: dict[str, tuple[int, ...]]) -> None:
        """Finds the tensors of the model.

        Raises:
            CheckpointError: the checkpoint has other tensors, or its ranks disagree.
        """
        model_type = self.config.model_type
        if model_type not in FAMILIES:
            raise CheckpointError(
                f"--config is a {model_type}, which is not supported for Megatron-LM checkpoints "
                f"(supported: {', '.join(FAMILIES)})"
            )
        stored = self._common_names()
        for name in expected:
            mapping = weight_mapping(name)
            if mapping is not None and mapping.name in stored:
                self._mappings[name] = mapping
        unused = stored - {mapping.name for mapping in self._mappings.values()}
        if self.args.tied and "output_layer.weight" in unused:
            unused.discard("output_layer.weight")
            self._check_tied_head()
        if unused:
            raise CheckpointError(
                f"{self.folder} contains {min(unused)}, which a {model_type} of its args does not "
                "have"
            )
        for name in stored:
            self._check_ranks(name)
            self._check_fused_rows(name)

    def names(self) -> list[str]:
        return list(self._mappings)

    def shape(self, name: str) -> tuple[int, ...]:
        mapping, args = self._mappings[name], self.args
        shape = list(self.shards[0].shape(mapping.name))
        dim = split_dim(mapping.name)
        if dim is not None:
            shape[dim] *= len(self.shards)
        rows = {
            "query": args.num_heads * args.head_dim,
            "key": args.num_groups * args.head_dim,
            "value": args.num_groups * args.head_dim,
            "gate": shape[0] // 2,
            "up": shape[0] // 2,
        }
        shape[0] = rows.get(mapping.rows, shape[0])
        if _has_vocab_rows(mapping.name):
            shape[0] = min(shape[0], self.config.vocab_size)
        return tuple(reversed(shape) if mapping.transposed else shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.shards[0].dtype(self._mappings[name].name)

    def read(self, name: str, index: Index | None = None) -> Tensor:
        return self._merge(name)[index or ()].clone(memory_format=torch.contiguous_format)

    def logits(self, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Returns logits [B, S, V] from the stored tensors, each cast to `dtype` first."""
        from megatrain.conversion.megatron_model import MegatronModel

        logits = MegatronModel(self.shards, self.args, dtype).logits(tokens)
        return logits[..., : self.config.vocab_size]

    def _merge(self, name: str) -> Tensor:
        if self._cached is None or self._cached[0] != name:
            self._cached = None  # frees it first
            mapping = self._mappings[name]
            parts = [shard.view(mapping.name) for shard in self.shards]
            values = _ROWS[mapping.rows](parts, self.args, split_dim(mapping.name))
            if _has_vocab_rows(mapping.name):
                values = values[: self.config.vocab_size]
            values = values.t() if mapping.transposed else values
            self._cached = (name, values.clone(memory_format=torch.contiguous_format))
            for shard in self.shards:
                shard.release(mapping.name)
        return self._cached[1]

    def _common_names(self) -> set[str]:
        """Returns the names of the stored tensors, which must be the same on all tensor ranks."""
        first = self.shards[0].names()
        for rank, shard in enumerate(self.shards):
            different = shard.names() ^ first
            if different:
                name = min(different)
                raise CheckpointError(
                    f"{self.folder}: {name} is missing on tensor rank "
                    f"{rank if name in first else 0}"
                )
        return first

    def _check_tied_head(self) -> None:
        embedding = "embedding.word_embeddings.weight"
        for shard in self.shards:
            if embedding not in shard.names() or not torch.equal(
                shard.view("output_layer.weight"), shard.view(embedding)
            ):
                raise CheckpointError(
                    f"{self.folder} has tied embeddings, but the last stage's copy differs from "
                    "the first stage's"
                )

    def _check_ranks(self, name: str) -> None:
        """Checks that all tensor ranks have the same shape, and the same values unless split."""
        first, *others = self.shards
        shape, dtype = first.shape(name), first.dtype(name)
        for rank, other in enumerate(others, start=1):
            if (other.shape(name), other.dtype(name)) != (shape, dtype):
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {other.shape(name)} on tensor rank {rank} "
                    f"and {shape} on rank 0"
                )
            if split_dim(name) is None and not torch.equal(first.view(name), other.view(name)):
                raise CheckpointError(
                    f"{self.folder}: {name} has other values on tensor rank {rank} than on rank 0, "
                    "but is not split"
                )

    def _check_fused_rows(self, name: str) -> None:
        args, size, rows = self.args, len(self.shards), self.shards[0].shape(name)[:1]
        if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
            heads = args.num_groups * (args.num_heads // args.num_groups + 2)
            if args.num_groups % size or rows[0] * size != heads * args.head_dim:
                raise CheckpointError(
                    f"{self.folder}: {name} has {rows[0]} rows on each of {size} tensor ranks, but "
                    f"{args.num_heads} heads in {args.num_groups} groups of head_dim "
                    f"{args.head_dim} require {heads * args.head_dim} in total"
                )
        is_fc1 = name.endswith(("linear_fc1.weight", "linear_fc1.bias"))
        if args.gated and is_fc1 and rows[0] % 2:
            raise CheckpointError(
                f"{self.folder}: {name} has {rows[0]} rows, which cannot be split into gate and up"
            )


def _has_vocab_rows(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


RowSelector = Callable[[list[Tensor], MegatronArgs, int | None], Tensor]
"""Merges rows of a tensor from its parts on all tensor ranks, given the dimension that is split."""


def _all_rows(parts: list[Tensor], args: MegatronArgs, dim: int | None) -> Tensor:
    return parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)


def _heads(select: Callable[[Tensor], Tensor]) -> RowSelector:
    """Returns a selector of heads from groups [G, n + 2, head_dim, ...] of each rank."""

    def rows(parts: list[Tensor], args: MegatronArgs, dim: int | None) -> Tensor:
        heads_per_group = args.num_heads // args.num_groups + 2
        groups = [part.view(-1, heads_per_group, args.head_dim, *part.shape[1:]) for part in parts]
        return torch.cat([select(group).flatten(0, 2) for group in groups])

    return rows


def _half(number: int) -> RowSelector:
    return lambda parts, args, dim: torch.cat([part.chunk(2)[number] for part in parts])


_QUERY = _heads(lambda groups: groups[:, :-2])
_KEY = _heads(lambda groups: groups[:, -2:-1])
_VALUE = _heads(lambda groups: groups[:, -1:])
_ROWS: dict[str, RowSelector] = {
    "all": _all_rows,
    "query": _QUERY,
    "key": _KEY,
    "value": _VALUE,
    "gate": _half(0),
    "up": _half(1),
    "query, key, value": lambda parts, args, dim: torch.cat(
        [rows(parts, args, dim) for rows in (_QUERY, _KEY, _VALUE)]
    ),
}
