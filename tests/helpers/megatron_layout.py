"""Writes a transformers model as Megatron-LM would have saved it.

It follows the published layout of names, ranks and fused tensors with loops over heads and ranks.
It shares no code with the conversion.
"""

from __future__ import annotations

import enum
import io
import random
import sys
import types
from argparse import Namespace
from unittest import mock

import numpy as np
import torch

MODULES = {
    name: types.ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.enums")
}


class ModelType(enum.Enum):
    encoder_or_decoder = 1


ModelType.__module__, ModelType.__qualname__ = "megatron.core.enums", "ModelType"
MODULES["megatron.core.enums"].ModelType = ModelType


def fused_qkv(q, k, v, heads, groups):
    """Returns the queries, the key and the value of each group in turn."""
    head = q.shape[0] // heads
    rows = []
    for group in range(groups):
        for query in range(heads // groups):
            start = (group * (heads // groups) + query) * head
            rows.append(q[start : start + head])
        rows += [k[group * head : (group + 1) * head], v[group * head : (group + 1) * head]]
    return torch.cat(rows)


def llama_layer(state, layer, heads, groups):
    """Returns the unsplit tensors of a layer under core names."""
    prefix = f"model.layers.{layer}."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    found = {
        "input_layernorm.weight": tensors["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": tensors["post_attention_layernorm.weight"],
        "self_attention.linear_proj.weight": tensors["self_attn.o_proj.weight"],
        "mlp.linear_fc2.weight": tensors["mlp.down_proj.weight"],
    }
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in tensors:
            found[f"self_attention.linear_qkv.{kind}"] = fused_qkv(
                *(tensors[f"self_attn.{x}_proj.{kind}"] for x in "qkv"), heads, groups
            )
        if f"mlp.gate_proj.{kind}" in tensors:
            found[f"mlp.linear_fc1.{kind}"] = (
                tensors[f"mlp.gate_proj.{kind}"],
                tensors[f"mlp.up_proj.{kind}"],
            )
    for hf_name, name in (
        ("self_attn.o_proj.bias", "self_attention.linear_proj.bias"),
        ("mlp.down_proj.bias", "mlp.linear_fc2.bias"),
        ("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
        ("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
    ):
        if hf_name in tensors:
            found[name] = tensors[hf_name]
    return found


def gpt2_layer(state, layer, heads, groups):
    tensors = {
        name.removeprefix(f"transformer.h.{layer}."): tensor
        for name, tensor in state.items()
        if name.startswith(f"transformer.h.{layer}.")
    }
    found = {}
    for kind in ("weight", "bias"):
        weights = {
            name: tensors[f"{name}.{kind}"].t() if kind == "weight" else tensors[f"{name}.{kind}"]
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }
        found |= {
            f"input_layernorm.{kind}": tensors[f"ln_1.{kind}"],
            f"pre_mlp_layernorm.{kind}": tensors[f"ln_2.{kind}"],
            f"self_attention.linear_qkv.{kind}": fused_qkv(
                *weights["attn.c_attn"].chunk(3), heads, groups
            ),
            f"self_attention.linear_proj.{kind}": weights["attn.c_proj"],
            f"mlp.linear_fc1.{kind}": weights["mlp.c_fc"],
            f"mlp.linear_fc2.{kind}": weights["mlp.c_proj"],
        }
    return found


def whole_tensors(model, *, stacked):
    """Returns the model under core names; `stacked` puts layers into the first dimension."""
    config, state = (
        model.config,
        {name: tensor.detach() for name, tensor in model.state_dict().items()},
    )
    is_gpt2 = config.model_type == "gpt2"
    heads = config.num_attention_heads
    layers = [
        (gpt2_layer if is_gpt2 else llama_layer)(
            state, layer, heads, heads if is_gpt2 else config.num_key_value_heads
        )
        for layer in range(config.num_hidden_layers)
    ]
    layers = [
        {
            name: torch.cat(value) if isinstance(value, tuple) else value
            for name, value in layer.items()
        }
        for layer in layers
    ]
    if stacked:
        found = {
            f"decoder.layers.{te_name(name)}": torch.stack([layer[name] for layer in layers])
            for name in layers[0]
        }
    else:
        found = {
            f"decoder.layers.{number}.{te_name(name)}": value
            for number, layer in enumerate(layers)
            for name, value in layer.items()
        }
    base = "transformer" if is_gpt2 else "model"
    renames = {
        "wte.weight": "embedding.word_embeddings.weight",
        "wpe.weight": "embedding.position_embeddings.weight",
        "embed_tokens.weight": "embedding.word_embeddings.weight",
        **{
            f"{norm}.{kind}": f"decoder.final_layernorm.{kind}"
            for norm in ("norm", "ln_f")
            for kind in ("weight", "bias")
        },
    }
    found |= {
        name: state[f"{base}.{hf_name}"]
        for hf_name, name in renames.items()
        if f"{base}.{hf_name}" in state
    }
    if not config.tie_word_embeddings:
        found["output_layer.weight"] = state["lm_head.weight"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def rank_part(name, value, rank, size):
    """Returns the part of a tensor that one tensor rank holds."""
    if isinstance(value, tuple):
        return torch.cat([rank_part(name, half, rank, size) for half in value])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return value.chunk(size, dim=1)[rank].clone()
    if (
        "linear_qkv" in name
        or "linear_fc1" in name
        or "word_embeddings" in name
        or "output_layer" in name
    ):
        return value.chunk(size)[rank].clone()
    return value.clone()


def te_name(name):
    """Returns the name of Transformer Engine, which keeps a norm inside the next linear."""
    return name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
        "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
    )


def legacy_name(name):
    for core, old in (
        ("pre_mlp_layernorm", "post_attention_layernorm"),
        ("linear_qkv", "query_key_value"),
        ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"),
        ("linear_fc2", "dense_4h_to_h"),
    ):
        name = name.replace(core, old)
    return name


def arguments(config, tensor, pipeline, **more):
    is_gpt2 = config.model_type == "gpt2"
    groups = config.n_head if is_gpt2 else config.num_key_value_heads
    common = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "model_type": ModelType.encoder_or_decoder,
        "params_dtype": torch.float32,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": groups != config.num_attention_heads,
        "num_query_groups": groups,
        "max_position_embeddings": config.max_position_embeddings,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "num_experts": None,
        "iteration": 7,
    }
    if is_gpt2:
        own = {
            "ffn_hidden_size": 4 * config.n_embd,
            "position_embedding_type": "learned_absolute",
            "normalization": "LayerNorm",
            "swiglu": False,
            "add_bias_linear": True,
            "norm_epsilon": config.layer_norm_epsilon,
            "bias_gelu_fusion": config.activation_function != "gelu",
        }
    else:
        own = {
            "ffn_hidden_size": config.intermediate_size,
            "position_embedding_type": "rope",
            "normalization": "RMSNorm",
            "swiglu": True,
            "add_bias_linear": bool(getattr(config, "mlp_bias", False)),
            "add_qkv_bias": config.model_type == "qwen2",
            "qk_layernorm": config.model_type == "qwen3",
            "norm_epsilon": config.rms_norm_eps,
            "kv_channels": getattr(config, "head_dim", None),
            "rotary_base": int(config.rope_parameters["rope_theta"]),
            "rotary_percent": 1.0,
        }
    return Namespace(**{**common, **own, **more})


def write_megatron(
    folder, model, *, tensor=1, pipeline=1, virtual=1, names="te", padded=None, args=True, **more
):
    """Writes one file a rank, with the other objects that such files contain.

    Args:
        folder: the iteration's folder.
        model: a transformers model.
        tensor, pipeline, virtual: the layout.
        names: "te", "core" or "legacy".
        padded: rows of the embedding.
        args: whether the files have args.
        more: further args.
    """
    stages = _split_stages(model, pipeline * virtual, tensor, padded)
    for rank in range(tensor):
        for stage in range(pipeline):
            chunks = [
                renamed(
                    {
                        name: rank_part(name, value, rank, tensor)
                        for name, value in stages[chunk * pipeline + stage].items()
                    },
                    names,
                    model.config,
                )
                for chunk in range(virtual)
            ]
            suffix = "" if pipeline == 1 else f"_{stage:03d}"
            rank_folder = folder / f"mp_rank_{rank:02d}{suffix}"
            rank_folder.mkdir(parents=True)
            rank_args = arguments(model.config, tensor, pipeline, **more) if args else None
            with mock.patch.dict(sys.modules, MODULES):
                torch.save(_rank_file(chunks, rank_args), rank_folder / "model_optim_rng.pt")


def _split_stages(model, count, tensor, padded):
    """Returns the tensors of each stage, whose layers count from 0."""
    config = model.config
    state = {name: value.detach() for name, value in model.state_dict().items()}
    is_gpt2 = config.model_type == "gpt2"
    heads = config.num_attention_heads
    groups = heads if is_gpt2 else config.num_key_value_heads
    make_layer, norm = (gpt2_layer, "transformer.ln_f") if is_gpt2 else (llama_layer, "model.norm")
    layers = [make_layer(state, layer, heads, groups) for layer in range(config.num_hidden_layers)]
    size = len(layers) // count

    def pad(table):
        rows = (padded or -(-len(table) // tensor) * tensor) - len(table)
        return torch.cat([table, torch.randn(rows, table.shape[1])]) if rows else table

    embedding = pad(state["transformer.wte.weight" if is_gpt2 else "model.embed_tokens.weight"])
    head = embedding if config.tie_word_embeddings else pad(state["lm_head.weight"])
    stages = [
        {
            f"decoder.layers.{number}.{name}": value
            for number, layer in enumerate(layers[first : first + size])
            for name, value in layer.items()
        }
        for first in range(0, len(layers), size)
    ]
    stages[0]["embedding.word_embeddings.weight"] = embedding
    if is_gpt2:
        stages[0]["embedding.position_embeddings.weight"] = state["transformer.wpe.weight"]
    for kind in ("weight", "bias"):
        if f"{norm}.{kind}" in state:
            stages[-1][f"decoder.final_layernorm.{kind}"] = state[f"{norm}.{kind}"]
    if not config.tie_word_embeddings or count > 1:
        stages[-1]["output_layer.weight"] = head
    return stages


def _rank_file(chunks, args):
    numbered = {f"model{number}": chunk for number, chunk in enumerate(chunks)}
    content = {"model": chunks[0]} if len(chunks) == 1 else numbered
    content |= {
        "checkpoint_version": 3.0,
        "iteration": 7,
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ],
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }
    return content if args is None else {**content, "args": args}


def renamed(part, names, config):
    if names == "core":
        return part
    if names == "te":
        extra = {"decoder.layers.0.self_attention.linear_qkv._extra_state": io.BytesIO(b"fp8")}
        return {te_name(name): tensor for name, tensor in part.items()} | extra
    model = {}
    encoder = {
        legacy_name(name.removeprefix("decoder.")): tensor
        for name, tensor in part.items()
        if name.startswith("decoder.")
    }
    model["encoder"] = encoder
    for name in ("word", "position"):
        if f"embedding.{name}_embeddings.weight" in part:
            model.setdefault("embedding", {})[f"{name}_embeddings"] = {
                "weight": part[f"embedding.{name}_embeddings.weight"]
            }
    if "output_layer.weight" in part and config.tie_word_embeddings:
        return {
            "language_model": model,
            "word_embeddings_for_head": {"weight": part["output_layer.weight"]},
        }
    if "output_layer.weight" in part:
        model["output_layer"] = {"weight": part["output_layer.weight"]}
    return {"language_model": model}
