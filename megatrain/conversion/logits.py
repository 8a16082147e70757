"""Logits of a model that lies in a folder, computed in fp32 from one matrix at a time: by our layers, and by transformers' own."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.config.loader import Config
from megatrain.conversion.sources import Readable
from megatrain.conversion.streamed_forward import holding, rows_of, streamed
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import ShardSpec, shard_spec
from megatrain.models.config import TransformerConfig
from megatrain.models.microbatches import MicrobatchFactory
from megatrain.models.params import ParamFactory
from megatrain.models.transformer import build_layers, layer_specs

SEQUENCES, LENGTH = 2, 24


def fixed_prompts(architecture: TransformerConfig) -> Tensor:
    """Tokens int64 [B, S], the same for every model of this vocabulary."""
    generator = torch.Generator().manual_seed(20)
    length = min(LENGTH, architecture.max_positions)
    return torch.randint(0, architecture.vocab_size, (SEQUENCES, length), generator=generator)


def whole_model(architecture: TransformerConfig) -> nn.ModuleList:
    """All layers on one rank, without memory."""
    parts = ParamFactory(
        architecture,
        make_mesh(0, connect=False),
        sequence=False,
        dtype=torch.float32,
        device="meta",
    )
    return build_layers(layer_specs(architecture), parts, recompute="none").eval()


@torch.no_grad()
def our_logits(architecture: TransformerConfig, tensors: Readable, tokens: Tensor) -> Tensor:
    """[B, S, V] by the layers that train."""
    layers = whole_model(architecture)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    factory = MicrobatchFactory(
        Config(), architecture, make_mesh(0, connect=False), torch.device("cpu")
    )
    microbatch = factory.make(
        Batch(tokens, tokens, positions, torch.zeros_like(tokens)), step=None, index=0
    )

    def read(parameter: nn.Parameter, rows: slice | None) -> Tensor:
        return read_declared(tensors, shard_spec(parameter), rows).float()

    with streamed(layers, read):
        hidden_states = None
        for layer in layers[:-1]:
            hidden_states = layer(hidden_states, microbatch)
        head: Any = layers[-1]
        pieces = []
        for rows in rows_of(head.weight):
            with holding(head, "weight", read(head.weight, rows)):
                pieces.append(head.logits(hidden_states))
    return torch.cat(pieces, dim=-1).transpose(0, 1)


def read_declared(tensors: Readable, declaration: ShardSpec, rows: slice | None = None) -> Tensor:
    """The values that a declaration names, as the parameter holds them; or some of its rows."""
    regions = declaration.regions()
    if rows is not None and len(regions) == 1 and not declaration.transposed:
        first, *others = regions[0].whole
        return tensors.read(
            declaration.name, (slice(first.start + rows.start, first.start + rows.stop), *others)
        )
    part = torch.empty(declaration.part_shape(), dtype=tensors.dtype(declaration.name))
    for region in regions:
        part[region.part] = tensors.read(declaration.name, region.whole)
    values = part.t() if declaration.transposed else part
    return values if rows is None else values[rows]


@torch.no_grad()
def transformers_logits(config: Any, tensors: Readable, names: list[str], tokens: Tensor) -> Tensor:
    """[B, S, V] by transformers' model of the config, its parameters looked up among `names`."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
        ).eval()
    model.tie_weights()  # which the meta device undid
    known = set(names)
    homes = {
        id(parameter): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in known
    }
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in homes]
    if missing:
        raise AssertionError(
            f"transformers' {type(model).__name__} wants {missing[0]}, which is not among the tensors"
        )

    def read(parameter: nn.Parameter, rows: slice | None) -> Tensor:
        return tensors.read(homes[id(parameter)], None if rows is None else (rows,)).float()

    with streamed(model, read):
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits
