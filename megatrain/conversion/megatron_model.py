"""Megatron-LM's decoder in plain torch, on its own tensors: the reference for a converted model.

It computes as the tensor ranks would, each with its heads and features, and adds up their results.
It shares no code with the conversion.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.conversion.megatron_args import MegatronArgs
from megatrain.conversion.megatron_legacy import RankShard


class MegatronModel:
    """Computes in fp32, one matrix of one rank at a time, each cast to `dtype` first."""

    def __init__(
        self, shards: list[RankShard], args: MegatronArgs, dtype: torch.dtype | None
    ) -> None:
        self.shards, self.args, self.dtype = shards, args, dtype

    def _read(self, rank: int, name: str) -> Tensor | None:
        shard = self.shards[rank]
        if name not in shard.names():
            return None
        exact = shard.view(name).clone()
        shard.release(name)
        return (exact if self.dtype is None else exact.to(self.dtype)).float()

    def _require(self, rank: int, name: str) -> Tensor:
        tensor = self._read(rank, name)
        assert tensor is not None, name
        return tensor

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Returns logits [B, S, padded vocabulary] of tokens [B, S]."""
        x = self._embed(tokens)
        rotation = self._rope(tokens.shape[1]) if self.args.rotary else None
        for layer in range(self.args.num_layers):
            prefix = f"decoder.layers.{layer}"
            x = x + self._attention(
                self._norm(x, f"{prefix}.input_layernorm"), f"{prefix}.self_attention", rotation
            )
            x = x + self._mlp(self._norm(x, f"{prefix}.pre_mlp_layernorm"), f"{prefix}.mlp")
        x = self._norm(x, "decoder.final_layernorm")
        head = "embedding.word_embeddings.weight" if self.args.tied else "output_layer.weight"
        return torch.cat(
            [x @ self._require(rank, head).t() for rank in range(len(self.shards))], dim=-1
        )

    def _embed(self, tokens: Tensor) -> Tensor:
        x, start = torch.zeros(*tokens.shape, self.args.hidden_size), 0
        for rank in range(len(self.shards)):
            table = self._require(rank, "embedding.word_embeddings.weight")
            local = (tokens >= start) & (tokens < start + len(table))
            x[local] += table[tokens[local] - start]
            start += len(table)
        if not self.args.rotary:
            x = x + self._require(0, "embedding.position_embeddings.weight")[: tokens.shape[1]]
        return x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._require(0, f"{name}.weight")
        if self.args.norm == "LayerNorm":
            return F.layer_norm(
                x, weight.shape, weight, self._read(0, f"{name}.bias"), self.args.norm_eps
            )
        return F.rms_norm(x, weight.shape, weight, self.args.norm_eps)

    def _attention(self, x: Tensor, prefix: str, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        args, total = self.args, torch.zeros_like(x)
        queries = args.num_heads // args.num_groups
        for rank in range(len(self.shards)):
            qkv = F.linear(
                x,
                self._require(rank, f"{prefix}.linear_qkv.weight"),
                self._read(rank, f"{prefix}.linear_qkv.bias"),
            )
            qkv = qkv.unflatten(-1, (-1, queries + 2, args.head_dim))
            q, k, v = qkv.split([queries, 1, 1], dim=-2)
            q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
            if args.qk_norm:
                q, k = (
                    self._norm(q, f"{prefix}.q_layernorm"),
                    self._norm(k, f"{prefix}.k_layernorm"),
                )
            if rotation is not None:
                q, k = _rotate(q, *rotation), _rotate(k, *rotation)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            total += F.linear(
                y.transpose(1, 2).flatten(2), self._require(rank, f"{prefix}.linear_proj.weight")
            )
        bias = self._read(0, f"{prefix}.linear_proj.bias")
        return total if bias is None else total + bias

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        total = torch.zeros_like(x)
        for rank in range(len(self.shards)):
            y = F.linear(
                x,
                self._require(rank, f"{prefix}.linear_fc1.weight"),
                self._read(rank, f"{prefix}.linear_fc1.bias"),
            )
            if self.args.gated:
                gate, up = y.chunk(2, dim=-1)
                y = F.silu(gate) * up
            else:
                y = F.gelu(y, approximate="tanh" if self.args.activation == "gelu_tanh" else "none")
            total += F.linear(y, self._require(rank, f"{prefix}.linear_fc2.weight"))
        bias = self._read(0, f"{prefix}.linear_fc2.bias")
        return total if bias is None else total + bias

    def _rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines [S, head_dim]."""
        args = self.args
        frequencies = args.rope_base ** -(torch.arange(0, args.head_dim, 2).float() / args.head_dim)
        if args.rope_llama3 and args.rope_factor is not None:
            frequencies = _scale_llama3(frequencies, args.rope_factor)
        elif args.rope_factor is not None:
            frequencies = frequencies / args.rope_factor
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


def _scale_llama3(
    frequencies: Tensor, factor: float, low: float = 1.0, high: float = 4.0, context: int = 8192
) -> Tensor:
    """Returns the frequencies of Llama 3.1: long wavelengths are scaled, short ones kept."""
    wavelengths = 2 * math.pi / frequencies
    kept = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-two, one), dim=-1) * sin
