"""Causal self-attention with grouped key and value heads, its heads split over tensor ranks.

    [S, B, H] -> query [S, B, h, d], key and value [S, B, g, d] -> rotate -> attend -> [S, B, h*d] -> out -> [S, B, H]

h query heads and g key-value heads on this rank, d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatrain.distributed import collectives
from megatrain.distributed.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    to_matmul_dtype,
)
from megatrain.models.microbatch import Microbatch
from megatrain.models.norm import query_key_norms
from megatrain.models.params import ParamFactory
from megatrain.models.rope import rotate
from megatrain.ops.cpu_attention import causal_attention, supports
from megatrain.ops.random import dropout


class Attention(nn.Module):
    def __init__(self, parts: ParamFactory, layer: int, *, recompute: bool) -> None:
        super().__init__()
        a = parts.architecture
        self.layer, self.heads, self.kv_heads, self.head_dim = (
            layer,
            parts.heads,
            parts.kv_heads,
            a.head_dim,
        )
        self.axis, self.sequence, self.recompute, self.compiled = (
            parts.mesh.tensor,
            parts.sequence,
            recompute,
            parts.compiled,
        )
        self.scale, self.cap = (
            a.head_dim**-0.5 if a.attention_scale is None else a.attention_scale,
            a.attention_cap,
        )
        self.window, self.rope_kind, self.dropout = (
            a.window(layer),
            a.rope_kind(layer),
            a.attention_dropout,
        )
        self.query = ColumnParallelLinear(*parts.columns("query", layer, bias=a.qkv_bias))
        self.key = ColumnParallelLinear(*parts.columns("key", layer, bias=a.qkv_bias))
        self.value = ColumnParallelLinear(*parts.columns("value", layer, bias=a.qkv_bias))
        self.query_norm, self.key_norm = query_key_norms(parts, layer)
        self.out = RowParallelLinear(
            *parts.rows("out", layer, bias=a.out_bias), axis=self.axis, sequence=self.sequence
        )

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        x = collectives.enter_tensor_parallel(x, self.axis, sequence=self.sequence)
        q, k, v = self.query(x, microbatch), self.key(x, microbatch), self.value(x, microbatch)
        if self.recompute and self.training:
            y = checkpoint(
                self._core, q, k, v, microbatch, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y = self._core(q, k, v, microbatch)
        return self.out(y, microbatch)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, microbatch: Microbatch) -> Tensor:
        """Query [S, B, h*d], key and value [S, B, g*d] -> [S, B, h*d]."""
        q = q.unflatten(-1, (self.heads, self.head_dim))
        k = k.unflatten(-1, (self.kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))
        q, k = self.query_norm(q), self.key_norm(k)
        if microbatch.rotations:
            turn = microbatch.rotations[self.rope_kind]
            q, k = rotate(q, turn, compiled=self.compiled), rotate(k, turn, compiled=self.compiled)
        y = self._attend(
            q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3), microbatch
        )
        return y.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, microbatch: Microbatch) -> Tensor:
        """Scaled dot products, q [B, h, S, d], k and v [B, g, S, d] -> [B, h, S, d]."""
        mask = microbatch.mask(self.window)
        dtype = q.dtype
        q, k, v = to_matmul_dtype(q), to_matmul_dtype(k), to_matmul_dtype(v)
        probability = self.dropout if self.training else 0.0
        if probability > 0.0 or self.cap is not None:
            return self._attend_written_out(q, k, v, mask, probability, microbatch).to(dtype)
        if mask is None and torch.is_grad_enabled() and supports(q, k):
            return causal_attention(q, k, v, self.scale, compile=self.compiled)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.heads != self.kv_heads,
        )
        return y.to(dtype)

    def _attend_written_out(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        probability: float,
        microbatch: Microbatch,
    ) -> Tensor:
        """Because torch's kernels cap no scores, and the dropout inside them cannot be given a mask of ours."""
        if mask is None:
            length = q.shape[2]
            mask = q.new_ones((length, length), dtype=bool).tril()
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).mul_(self.scale)
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        weights = F.softmax(scores.masked_fill(~mask, float("-inf")).float(), dim=-1).to(q.dtype)
        if probability > 0.0:
            weights = dropout(
                weights,
                probability,
                microbatch.mask_key("attention", self.layer, self.axis.rank),
                training=True,
            )
        return weights @ v
