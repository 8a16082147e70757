"""Causal self-attention with grouped key and value heads, its heads split over tensor ranks.

    [S, B, H] -> query [S, B, h, d], key and value [S, B, g, d] -> rotate -> attend -> [S, B, h*d]
    -> out -> [S, B, H]

Shapes: S sequence, B micro-batch, H hidden; h query heads and g key-value heads of this rank; d
head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatrain.distributed import collectives
from megatrain.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatrain.models.microbatch import Microbatch
from megatrain.models.norm import query_key_norm
from megatrain.models.params import ParamFactory
from megatrain.ops.cpu_attention import causal_attention, supports
from megatrain.ops.dtypes import to_matmul_dtype
from megatrain.ops.random import dropout
from megatrain.ops.rope import rotate


class Attention(nn.Module):
    """The attention of a block; `recompute` repeats all but its linears in the backward."""

    def __init__(self, params: ParamFactory, layer: int, *, recompute: bool) -> None:
        super().__init__()
        a = params.architecture
        self.layer, self.recompute, self.compiled = layer, recompute, params.compiled
        self.axis, self.sequence = params.mesh.tensor, params.sequence
        self.heads, self.kv_heads, self.head_dim = params.heads, params.kv_heads, a.head_dim
        self.scale = a.head_dim**-0.5 if a.attention_scale is None else a.attention_scale
        self.softcap, self.dropout = a.attention_softcap, a.attention_dropout
        self.window, self.rope_kind = a.window(layer), a.rope_kind(layer)
        self.query = ColumnParallelLinear(*params.column_parallel("query", layer, bias=a.qkv_bias))
        self.key = ColumnParallelLinear(*params.column_parallel("key", layer, bias=a.qkv_bias))
        self.value = ColumnParallelLinear(*params.column_parallel("value", layer, bias=a.qkv_bias))
        self.query_norm = query_key_norm(params, "query", layer)
        self.key_norm = query_key_norm(params, "key", layer)
        out = params.row_parallel("out", layer, bias=a.out_bias)
        self.out = RowParallelLinear(*out, axis=self.axis, sequence=self.sequence)

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        """Returns the attention's output; input and output have the shape of the hidden states."""
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
        """Returns attention [S, B, h*d] of query [S, B, h*d], key and value [S, B, g*d]."""
        q = q.unflatten(-1, (self.heads, self.head_dim))
        k = k.unflatten(-1, (self.kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))
        q, k = self.query_norm(q), self.key_norm(k)
        if microbatch.rotations:
            rotation = microbatch.rotations[self.rope_kind]
            q = rotate(q, rotation, compile=self.compiled)
            k = rotate(k, rotation, compile=self.compiled)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return self._attend(q, k, v, microbatch).permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, microbatch: Microbatch) -> Tensor:
        """Returns attention [B, h, S, d] of q [B, h, S, d], k and v [B, g, S, d]."""
        mask = microbatch.mask(self.window)
        dtype = q.dtype
        q, k, v = to_matmul_dtype(q), to_matmul_dtype(k), to_matmul_dtype(v)
        if self.softcap is not None or (self.training and self.dropout > 0.0):
            return self._attend_unfused(q, k, v, mask, microbatch).to(dtype)
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

    def _attend_unfused(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, microbatch: Microbatch
    ) -> Tensor:
        """Returns attention with soft-capped scores and with dropout of an explicit mask.

        torch's kernels support neither.
        """
        if mask is None:
            length = q.shape[2]
            mask = q.new_ones((length, length), dtype=bool).tril()
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).mul_(self.scale)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        weights = F.softmax(scores.masked_fill(~mask, float("-inf")).float(), dim=-1).to(q.dtype)
        if self.training and self.dropout > 0.0:
            key = microbatch.mask_key("attention", self.layer, self.axis.rank)
            weights = dropout(weights, self.dropout, key, training=True)
        return weights @ v
