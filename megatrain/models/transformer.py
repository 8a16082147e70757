"""A decoder as a list of layers: embedding, blocks, head. A stage holds a slice of the list.

Each layer maps (hidden states, microbatch) to hidden states; the head returns the loss.

Shapes: S sequence, B micro-batch, H hidden, V vocabulary, t tensor ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatrain.distributed import collectives
from megatrain.distributed.cross_entropy import vocab_parallel_cross_entropy
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.tensor_parallel import VocabParallelEmbedding, linear
from megatrain.models.attention import Attention
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.config import TransformerConfig
from megatrain.models.losses import Objective, TokenLoss
from megatrain.models.microbatch import Microbatch
from megatrain.models.mlp import MLP
from megatrain.models.norm import hidden_norm, optional_norm
from megatrain.models.params import ParamFactory
from megatrain.ops.random import dropout


class HiddenStates(NamedTuple):
    """The output of a layer, which is also what stages send to each other.

    hidden: [S, B, H], or this tensor rank's shard [S/t, B, H] under sequence parallelism.
    """

    hidden: Tensor


class LayerSpec(NamedTuple):
    """An entry of the list of layers: enough to plan stages and to count parameters."""

    kind: str
    number: int

    @property
    def title(self) -> str:
        return f"block {self.number}" if self.kind == "block" else self.kind


def layer_specs(architecture: TransformerConfig) -> list[LayerSpec]:
    """Returns all layers of the model in order."""
    blocks = [LayerSpec("block", index) for index in range(architecture.num_layers)]
    return [LayerSpec("embedding", 0), *blocks, LayerSpec("head", 0)]


def build_layer(
    spec: LayerSpec, params: ParamFactory, *, recompute: str, tied_across: bool
) -> nn.Module:
    """Builds this rank's shard of a layer, with uninitialised parameters.

    Args:
        tied_across: embedding and head share a matrix and live on two ranks, each with a copy.
    """
    if spec.kind == "embedding":
        return Embedding(params, tied_across=tied_across)
    if spec.kind == "head":
        if params.architecture.classifier is not None:
            return ClassificationHead(params)
        return Head(params, tied_across=tied_across)
    return Block(params, spec.number, recompute=recompute)


def build_chunks(
    chunks: list[list[LayerSpec]], params: ParamFactory, *, recompute: str
) -> list[nn.ModuleList]:
    """Builds a rank's layers by chunk; a tied embedding and head on one rank share one
    parameter."""
    kinds = {spec.kind for chunk in chunks for spec in chunk}
    has_both = {"embedding", "head"} <= kinds
    tied_across = params.architecture.tied and not has_both
    built = [
        nn.ModuleList(
            build_layer(spec, params, recompute=recompute, tied_across=tied_across)
            for spec in chunk
        )
        for chunk in chunks
    ]
    if params.architecture.tied and has_both:
        layers = [layer for chunk in built for layer in chunk]
        embedding = next(layer for layer in layers if isinstance(layer, Embedding))
        head = next(layer for layer in layers if isinstance(layer, Head))
        head.weight = embedding.tokens.weight
    return built


def build_layers(specs: list[LayerSpec], params: ParamFactory, *, recompute: str) -> nn.ModuleList:
    """Builds the layers of a rank with one chunk."""
    return build_chunks([specs], params, recompute=recompute)[0]


def build_meta_model(architecture: TransformerConfig) -> nn.ModuleList:
    """Builds all layers of the unsharded model on the meta device, without memory."""
    params = ParamFactory(
        architecture,
        make_mesh(0, connect=False),
        sequence=False,
        dtype=torch.float32,
        device="meta",
    )
    return build_layers(layer_specs(architecture), params, recompute="none")


class ResidualDropout(nn.Module):
    """Dropout at the end of a residual branch.

    Tensor ranks drop the same where they hold replicas, and independently where they hold shards.
    """

    def __init__(self, params: ParamFactory, probability: float, branch: str, layer: int) -> None:
        super().__init__()
        self.probability, self.branch, self.layer = probability, branch, layer
        self.shard = params.mesh.tensor.rank if params.sequence else None

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        if self.probability == 0.0 or not self.training:
            return x
        key = microbatch.mask_key(self.branch, self.layer, self.shard)
        return dropout(x, self.probability, key, training=True)


class Embedding(nn.Module):
    """Embeddings of tokens, with learned positions if the model is not rotary: -> [S, B, H]."""

    def __init__(self, params: ParamFactory, *, tied_across: bool) -> None:
        super().__init__()
        a, mesh = params.architecture, params.mesh
        axes = (mesh.embedding_group,) if tied_across else ()
        self.axis, self.sequence = mesh.tensor, params.sequence
        self.tokens = VocabParallelEmbedding(
            params.vocab_parallel("embedding", grad_reduce_axes=axes),
            start=params.vocab_start,
            axis=mesh.tensor,
            sequence=params.sequence,
            padding_token=a.padding_token,
        )
        self.scale = a.embedding_scale
        self.positions = None if a.rotary else PositionEmbedding(params)
        self.residual = ResidualDropout(params, a.embedding_dropout, "embedding", 0)

    def forward(self, hidden_states: HiddenStates | None, microbatch: Microbatch) -> HiddenStates:
        hidden = self.tokens(microbatch.tokens)
        if self.scale is not None:
            hidden = hidden * torch.tensor(self.scale, dtype=hidden.dtype)
        if self.positions is not None:
            hidden = hidden + self.positions(microbatch.positions)
        return HiddenStates(self.residual(hidden, microbatch))


class PositionEmbedding(nn.Module):
    """Learned positions: int64 [B, S] -> [S, B, H], this rank's shard under sequence
    parallelism."""

    def __init__(self, params: ParamFactory) -> None:
        super().__init__()
        self.weight = params.position_embedding()
        self.axis, self.sequence = params.mesh.tensor, params.sequence

    def forward(self, positions: Tensor) -> Tensor:
        local = positions.t()
        if self.sequence:
            local = collectives.own_shard(local, self.axis)
        return nn.functional.embedding(local, self.weight)


class Block(nn.Module):
    """A transformer block: attention and MLP, each a residual branch with its norms and dropout."""

    def __init__(self, params: ParamFactory, layer: int, *, recompute: str) -> None:
        super().__init__()
        a = params.architecture
        self.recompute, self.parallel = recompute == "full", a.parallel_residual
        self.attention_norm = optional_norm(params, "attention_norm", layer, present=a.pre_norm)
        self.attention = Attention(params, layer, recompute=recompute == "selective")
        self.attention_post_norm = optional_norm(
            params, "attention_post_norm", layer, present=a.post_norm
        )
        self.attention_residual = ResidualDropout(params, a.residual_dropout, "attention", layer)
        self.mlp_norm = optional_norm(params, "mlp_norm", layer, present=a.pre_norm)
        self.mlp = MLP(params, layer)
        self.mlp_post_norm = optional_norm(params, "mlp_post_norm", layer, present=a.post_norm)
        # "feedforward" is part of the masks' keys: another word would change resumed runs.
        self.mlp_residual = ResidualDropout(params, a.residual_dropout, "feedforward", layer)

    def forward(self, hidden_states: HiddenStates, microbatch: Microbatch) -> HiddenStates:
        if self.recompute and self.training:
            hidden = checkpoint(
                self._compute,
                hidden_states.hidden,
                microbatch,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            hidden = self._compute(hidden_states.hidden, microbatch)
        return HiddenStates(hidden)

    def _compute(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        attended = self.attention_post_norm(self.attention(self.attention_norm(x), microbatch))
        y = x + self.attention_residual(attended, microbatch)
        fed = self.mlp(self.mlp_norm(x if self.parallel else y), microbatch)
        return y + self.mlp_residual(self.mlp_post_norm(fed), microbatch)


class Head(nn.Module):
    """Final norm, logits over this rank's vocabulary, and the objective's loss (fp32 scalar)."""

    def __init__(self, params: ParamFactory, *, tied_across: bool) -> None:
        super().__init__()
        a, mesh = params.architecture, params.mesh
        axes = (mesh.embedding_group,) if tied_across else ()
        role = "embedding" if a.tied else "head"
        self.norm = hidden_norm(params, "final_norm", None)
        self.weight = params.vocab_parallel(role, is_owner=not tied_across, grad_reduce_axes=axes)
        self.axis, self.sequence, self.compiled = mesh.tensor, params.sequence, params.compiled
        self.start, self.vocab_size, self.softcap = (
            params.vocab_start,
            a.vocab_size,
            a.logit_softcap,
        )
        self.objective: Objective = TokenLoss()

    def forward(self, hidden_states: HiddenStates, microbatch: Microbatch) -> Tensor:
        losses = vocab_parallel_cross_entropy(
            self.logits(hidden_states).flatten(0, 1),
            microbatch.labels.t().reshape(-1),
            start=self.start,
            vocab_size=self.vocab_size,
            axis=self.axis,
            compile=self.compiled,
        )
        return self.objective(losses.unflatten(0, (microbatch.labels.shape[1], -1)), microbatch)

    def logits(self, hidden_states: HiddenStates) -> Tensor:
        """Returns logits [S, B, V/t] over this rank's part of the vocabulary."""
        hidden = self.norm(hidden_states.hidden)
        x = collectives.enter_tensor_parallel(hidden, self.axis, sequence=self.sequence)
        y = linear(x, self.weight)
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)
