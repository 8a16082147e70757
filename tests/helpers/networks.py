"""A model on one rank without DeepSpeed, and the same model in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatrain.config import loader as configuration
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.models.config import TransformerConfig, load_hf_config, read_config
from megatrain.models.init import initialize
from megatrain.models.microbatch import Microbatch
from megatrain.models.rope import rotations
from megatrain.models.transformer import Block, Embedding, Head
from megatrain.pipeline.stage_builder import build_stage

VOCABULARY, LENGTH = 67, 16
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(model: dict[str, Any], *, recompute: str = "none") -> nn.ModuleList:
    """Builds and initializes embedding, blocks and head."""
    config = configuration.from_dict({"train": {"recompute": recompute}})
    stage = build_stage(
        config, read_config(load_hf_config(model)), make_mesh(0, connect=False), "cpu"
    )
    initialize(stage, 5)
    return nn.ModuleList(
        module for module in stage.modules() if isinstance(module, Embedding | Block | Head)
    )


@torch.no_grad()
def scramble(layers: nn.ModuleList) -> None:
    """Randomizes each weight by its name, so that biases and norms matter in the logits."""
    for spec, parameter in parameters(layers):
        generator = torch.Generator().manual_seed(len(spec.name) * 1000 + sum(map(ord, spec.name)))
        values = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.copy_(values + spec.init.value)  # norms stay near what they start from


def make_microbatch(
    architecture: TransformerConfig,
    tokens: Tensor,
    labels: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    documents: Tensor | None = None,
    dropout_key: int | None = None,
) -> Microbatch:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) if positions is None else positions
    turns = rotations(positions, architecture, torch.float32)
    return Microbatch(
        tokens, tokens if labels is None else labels, positions, documents, turns, dropout_key
    )


def logits(layers: nn.ModuleList, given: Microbatch) -> Tensor:
    """Returns the logits [B, S, V]."""
    hidden_states = None
    for layer in layers[:-1]:
        hidden_states = layer(hidden_states, given)
    return layers[-1].logits(hidden_states).transpose(0, 1)


def loss(layers: nn.ModuleList, given: Microbatch) -> Tensor:
    """Returns the loss, summed over tokens."""
    hidden_states = None
    for layer in layers:
        hidden_states = layer(hidden_states, given)
    return hidden_states


def tokens(seed: int = 0, *, rows: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(
        0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def transformers_twin(model: dict[str, Any], layers: nn.ModuleList) -> nn.Module:
    """Returns transformers' model with the same weights."""
    from transformers import AutoModelForCausalLM

    config = load_hf_config(model)
    config._attn_implementation = "eager"
    twin = AutoModelForCausalLM.from_config(config)
    state = twin.state_dict()
    # Biases that ours lacks would stay at zero there, and nobody would see it.
    assert {spec.name for spec, _ in parameters(layers)} == {
        name for name, _ in twin.named_parameters()
    }
    for spec, parameter in parameters(layers):
        spec.unshard_into(spec.local_view(parameter.detach()), state[spec.name])
    twin.load_state_dict(state)
    return twin.eval()
