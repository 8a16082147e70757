"""A decoder as a list of layers: embedding, blocks, head. A stage takes a slice of the list; one rank takes all of it.

Each layer maps (what flows, context of the microbatch) to what flows on; the head's result is the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatrain.distributed import collectives
from megatrain.distributed.tensor_parallel import (
    VocabParallelEmbedding,
    linear,
    vocab_parallel_cross_entropy,
)
from megatrain.models.attention import Attention
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.config import TransformerConfig
from megatrain.models.losses import Objective, TokenLoss
from megatrain.models.microbatch import Microbatch
from megatrain.models.mlp import MLP
from megatrain.models.norm import hidden_norm
from megatrain.models.params import ParamFactory
from megatrain.ops.random import dropout


class HiddenStates(NamedTuple):
    """What goes from layer to layer and from stage to stage.

    hidden: [S, B, H], or this tensor rank's [S/t, B, H] under sequence parallelism.
    """

    hidden: Tensor


class LayerSpec(NamedTuple):
    """One entry of the list of layers, before it is built: enough to plan stages and to count parameters."""

    kind: str
    number: int

    @property
    def title(self) -> str:
        return f"block {self.number}" if self.kind == "block" else self.kind


def layer_specs(architecture: TransformerConfig) -> list[LayerSpec]:
    """The whole model in order."""
    blocks = [LayerSpec("block", index) for index in range(architecture.num_layers)]
    return [LayerSpec("embedding", 0), *blocks, LayerSpec("head", 0)]


def build_layer(
    spec: LayerSpec, parts: ParamFactory, *, recompute: str, tied_across: bool
) -> nn.Module:
    """The layer on this rank, its parameters not yet initialised.

    `tied_across`: embedding and head are one matrix and live on two ranks, each with a copy of it.
    """
    if spec.kind == "embedding":
        return Embedding(parts, tied_across=tied_across)
    if spec.kind == "head":
        return (
            Head(parts, tied_across=tied_across)
            if parts.architecture.classifier is None
            else ClassificationHead(parts)
        )
    return Block(parts, spec.number, recompute=recompute)


def build_chunks(
    chunks: list[list[LayerSpec]], parts: ParamFactory, *, recompute: str
) -> list[nn.ModuleList]:
    """A rank's layers by chunk; when embedding and tied head are both among them they share one parameter."""
    kinds = {spec.kind for chunk in chunks for spec in chunk}
    together = {"embedding", "head"} <= kinds
    tied_across = parts.architecture.tied and not together
    built = [
        nn.ModuleList(
            [
                build_layer(spec, parts, recompute=recompute, tied_across=tied_across)
                for spec in chunk
            ]
        )
        for chunk in chunks
    ]
    if parts.architecture.tied and together:
        layers = [layer for chunk in built for layer in chunk]
        embedding = next(layer for layer in layers if isinstance(layer, Embedding))
        head = next(layer for layer in layers if isinstance(layer, Head))
        head.weight = embedding.tokens.weight
    return built


def build_layers(specs: list[LayerSpec], parts: ParamFactory, *, recompute: str) -> nn.ModuleList:
    """The layers of a rank with one chunk."""
    return build_chunks([specs], parts, recompute=recompute)[0]


class ResidualDropout(nn.Module):
    """Dropout at the end of a residual branch: equal where tensor ranks hold copies, independent where they hold parts."""

    def __init__(self, parts: ParamFactory, probability: float, place: str, layer: int) -> None:
        super().__init__()
        self.probability, self.place, self.layer = probability, place, layer
        self.part = parts.mesh.tensor.rank if parts.sequence else None

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        if self.probability == 0.0 or not self.training:
            return x
        return dropout(
            x,
            self.probability,
            microbatch.mask_key(self.place, self.layer, self.part),
            training=True,
        )


class Embedding(nn.Module):
    def __init__(self, parts: ParamFactory, *, tied_across: bool) -> None:
        super().__init__()
        a, mesh = parts.architecture, parts.mesh
        grad_reduce_axes = (mesh.embedding_group,) if tied_across else ()
        weight = parts.vocabulary("embedding", grad_reduce_axes=grad_reduce_axes)
        self.axis, self.sequence = mesh.tensor, parts.sequence
        self.tokens = VocabParallelEmbedding(
            weight,
            start=parts.vocab_start,
            axis=mesh.tensor,
            sequence=parts.sequence,
            padding_token=a.padding_token,
        )
        self.scale = a.embedding_scale
        self.positions = None if a.rotary else PositionEmbedding(parts)
        self.residual = ResidualDropout(parts, a.embedding_dropout, "embedding", 0)

    def forward(self, hidden_states: HiddenStates | None, microbatch: Microbatch) -> HiddenStates:
        hidden = self.tokens(microbatch.tokens)
        if self.scale is not None:
            hidden = hidden * torch.tensor(self.scale, dtype=hidden.dtype)
        if self.positions is not None:
            hidden = hidden + self.positions(microbatch.positions)
        return HiddenStates(self.residual(hidden, microbatch))


class PositionEmbedding(nn.Module):
    """Learned positions: int64 [B, S] -> [S, B, H], this rank's part under sequence parallelism."""

    def __init__(self, parts: ParamFactory) -> None:
        super().__init__()
        self.weight = parts.position_table()
        self.axis, self.sequence = parts.mesh.tensor, parts.sequence

    def forward(self, positions: Tensor) -> Tensor:
        mine = positions.t()
        if self.sequence:
            mine = collectives.own_shard(mine, self.axis)
        return torch.nn.functional.embedding(mine, self.weight)


def _optional(there: bool) -> Callable[[ParamFactory, str, int], nn.Module]:
    """What makes a norm, or nothing in its place."""
    return hidden_norm if there else lambda parts, role, layer: nn.Identity()


class Block(nn.Module):
    def __init__(self, parts: ParamFactory, layer: int, *, recompute: str) -> None:
        super().__init__()
        a = parts.architecture
        self.recompute, self.parallel = recompute == "full", a.parallel_residual
        before, after = _optional(a.norm_before), _optional(a.norm_after)
        self.attention_norm = before(parts, "attention_norm", layer)
        self.attention = Attention(parts, layer, recompute=recompute == "selective")
        self.attention_norm_after = after(parts, "attention_norm_after", layer)
        self.attention_residual = ResidualDropout(parts, a.residual_dropout, "attention", layer)
        self.feedforward_norm = before(parts, "feedforward_norm", layer)
        self.feedforward = MLP(parts, layer)
        self.feedforward_norm_after = after(parts, "feedforward_norm_after", layer)
        self.feedforward_residual = ResidualDropout(parts, a.residual_dropout, "feedforward", layer)

    def forward(self, hidden_states: HiddenStates, microbatch: Microbatch) -> HiddenStates:
        if self.recompute and self.training:
            return HiddenStates(
                checkpoint(
                    self._compute,
                    hidden_states.hidden,
                    microbatch,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        return HiddenStates(self._compute(hidden_states.hidden, microbatch))

    def _compute(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        attended = self.attention_norm_after(self.attention(self.attention_norm(x), microbatch))
        y = x + self.attention_residual(attended, microbatch)
        fed = self.feedforward(self.feedforward_norm(x if self.parallel else y), microbatch)
        return y + self.feedforward_residual(self.feedforward_norm_after(fed), microbatch)


class Head(nn.Module):
    """Final norm, logits over this rank's vocabulary, and what the objective makes of the tokens' losses (fp32 scalar)."""

    def __init__(self, parts: ParamFactory, *, tied_across: bool) -> None:
        super().__init__()
        a, mesh = parts.architecture, parts.mesh
        grad_reduce_axes = (mesh.embedding_group,) if tied_across else ()
        self.norm = hidden_norm(parts, "final_norm", None)
        self.weight = parts.vocabulary(
            "embedding" if a.tied else "head",
            is_owner=not tied_across,
            grad_reduce_axes=grad_reduce_axes,
        )
        self.axis, self.sequence = mesh.tensor, parts.sequence
        self.start, self.vocab_size, self.cap, self.compiled = (
            parts.vocab_start,
            a.vocab_size,
            a.logit_cap,
            parts.compiled,
        )
        self.objective: Objective = TokenLoss()

    def forward(self, hidden_states: HiddenStates, microbatch: Microbatch) -> Tensor:
        logits = self.logits(hidden_states)
        labels = microbatch.labels.t().reshape(-1)
        losses = vocab_parallel_cross_entropy(
            logits.flatten(0, 1),
            labels,
            start=self.start,
            vocab_size=self.vocab_size,
            axis=self.axis,
            compile=self.compiled,
        )
        return self.objective(losses.unflatten(0, (microbatch.labels.shape[1], -1)), microbatch)

    def logits(self, hidden_states: HiddenStates) -> Tensor:
        """[S, B, V/t], this rank's part of the vocabulary."""
        x = collectives.enter_tensor_parallel(
            self.norm(hidden_states.hidden), self.axis, sequence=self.sequence
        )
        y = linear(x, self.weight)
        return y if self.cap is None else self.cap * torch.tanh(y / self.cap)
