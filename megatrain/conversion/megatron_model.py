"""Megatron-LM's decoder in plain torch, from its own tensors as the ranks hold them: what a converted model is proven against.

It works as the ranks would, each with its heads and features, their results added up, and shares no code with the conversion.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.conversion.megatron_args import MegatronArgs
from megatrain.conversion.megatron_legacy import RankShard


class MegatronModel:
    """Computes in fp32, one rank's matrix at a time, each rounded to `dtype` first."""

    def __init__(
        self, ranks: list[RankShard], settings: MegatronArgs, dtype: torch.dtype | None
    ) -> None:
        self.ranks, self.s, self.dtype = ranks, settings, dtype

    def _get(self, rank: int, name: str) -> Tensor | None:
        if name not in self.ranks[rank].names():
            return None
        exact = self.ranks[rank].view(name).clone()
        self.ranks[rank].let_go(name)
        return (exact if self.dtype is None else exact.to(self.dtype)).float()

    def _must(self, rank: int, name: str) -> Tensor:
        tensor = self._get(rank, name)
        assert tensor is not None, name
        return tensor

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> [B, S, padded vocabulary]."""
        x = self._embed(tokens)
        turn = self._angles(tokens.shape[1]) if self.s.rotary else None
        for layer in range(self.s.num_layers):
            at = f"decoder.layers.{layer}"
            x = x + self._attention(
                self._norm(x, f"{at}.input_layernorm"), f"{at}.self_attention", turn
            )
            x = x + self._mlp(self._norm(x, f"{at}.pre_mlp_layernorm"), f"{at}.mlp")
        x = self._norm(x, "decoder.final_layernorm")
        head = "embedding.word_embeddings.weight" if self.s.tied else "output_layer.weight"
        return torch.cat(
            [x @ self._must(rank, head).t() for rank in range(len(self.ranks))], dim=-1
        )

    def _embed(self, tokens: Tensor) -> Tensor:
        x, start = torch.zeros(*tokens.shape, self.s.hidden_size), 0
        for rank in range(len(self.ranks)):
            table = self._must(rank, "embedding.word_embeddings.weight")
            mine = (tokens >= start) & (tokens < start + len(table))
            x[mine] += table[tokens[mine] - start]
            start += len(table)
        if not self.s.rotary:
            x = x + self._must(0, "embedding.position_embeddings.weight")[: tokens.shape[1]]
        return x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._must(0, f"{name}.weight")
        if self.s.norm == "LayerNorm":
            return F.layer_norm(
                x, weight.shape, weight, self._get(0, f"{name}.bias"), self.s.norm_eps
            )
        return F.rms_norm(x, weight.shape, weight, self.s.norm_eps)

    def _attention(self, x: Tensor, at: str, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        s, total = self.s, torch.zeros_like(x)
        queries = s.num_heads // s.num_groups
        for rank in range(len(self.ranks)):
            mixed = F.linear(
                x,
                self._must(rank, f"{at}.linear_qkv.weight"),
                self._get(rank, f"{at}.linear_qkv.bias"),
            )
            mixed = mixed.unflatten(-1, (-1, queries + 2, s.head_dim))
            q, k, v = mixed.split([queries, 1, 1], dim=-2)
            q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
            if s.qk_norm:
                q, k = self._norm(q, f"{at}.q_layernorm"), self._norm(k, f"{at}.k_layernorm")
            if turn is not None:
                q, k = _turned(q, *turn), _turned(k, *turn)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            total += F.linear(
                y.transpose(1, 2).flatten(2), self._must(rank, f"{at}.linear_proj.weight")
            )
        bias = self._get(0, f"{at}.linear_proj.bias")
        return total if bias is None else total + bias

    def _mlp(self, x: Tensor, at: str) -> Tensor:
        total = torch.zeros_like(x)
        for rank in range(len(self.ranks)):
            y = F.linear(
                x,
                self._must(rank, f"{at}.linear_fc1.weight"),
                self._get(rank, f"{at}.linear_fc1.bias"),
            )
            if self.s.gated:
                gate, up = y.chunk(2, dim=-1)
                y = F.silu(gate) * up
            else:
                y = F.gelu(y, approximate="tanh" if self.s.activation == "gelu_tanh" else "none")
            total += F.linear(y, self._must(rank, f"{at}.linear_fc2.weight"))
        bias = self._get(0, f"{at}.linear_fc2.bias")
        return total if bias is None else total + bias

    def _angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, head_dim]."""
        s = self.s
        frequencies = s.rope_base ** -(torch.arange(0, s.head_dim, 2).float() / s.head_dim)
        if s.rope_llama3 and s.rope_factor is not None:
            frequencies = _stretched(frequencies, s.rope_factor)
        elif s.rope_factor is not None:
            frequencies = frequencies / s.rope_factor
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


def _stretched(
    frequencies: Tensor, factor: float, low: float = 1.0, high: float = 4.0, context: int = 8192
) -> Tensor:
    """Llama 3.1's: long waves by the factor, short ones not, those between in part."""
    waves = 2 * math.pi / frequencies
    share = ((context / waves - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / factor + share * frequencies


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-two, one), dim=-1) * sin
