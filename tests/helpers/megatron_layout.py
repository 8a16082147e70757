"""Writes a transformers model as Megatron-LM would have saved it, from the published layout of names, ranks and fused tensors.

Written apart from the converter: by loops over heads and ranks, as the layout is told.
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
    """Of each group: its queries, its key, its value."""
    head = q.shape[0] // heads
    rows = []
    for group in range(groups):
        for query in range(heads // groups):
            at = (group * (heads // groups) + query) * head
            rows.append(q[at : at + head])
        rows += [k[group * head : (group + 1) * head], v[group * head : (group + 1) * head]]
    return torch.cat(rows)


def llama_layer(state, layer, heads, groups):
    """Core names of one layer, whole."""
    at = f"model.layers.{layer}."
    of = {name.removeprefix(at): tensor for name, tensor in state.items() if name.startswith(at)}
    found = {
        "input_layernorm.weight": of["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": of["post_attention_layernorm.weight"],
        "self_attention.linear_proj.weight": of["self_attn.o_proj.weight"],
        "mlp.linear_fc2.weight": of["mlp.down_proj.weight"],
    }
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in of:
            found[f"self_attention.linear_qkv.{kind}"] = fused_qkv(
                *(of[f"self_attn.{x}_proj.{kind}"] for x in "qkv"), heads, groups
            )
        if f"mlp.gate_proj.{kind}" in of:
            found[f"mlp.linear_fc1.{kind}"] = (
                of[f"mlp.gate_proj.{kind}"],
                of[f"mlp.up_proj.{kind}"],
            )
    for theirs, ours in (
        ("self_attn.o_proj.bias", "self_attention.linear_proj.bias"),
        ("mlp.down_proj.bias", "mlp.linear_fc2.bias"),
        ("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
        ("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
    ):
        if theirs in of:
            found[ours] = of[theirs]
    return found


def gpt2_layer(state, layer, heads, groups):
    of = {
        name.removeprefix(f"transformer.h.{layer}."): tensor
        for name, tensor in state.items()
        if name.startswith(f"transformer.h.{layer}.")
    }
    found = {}
    for kind in ("weight", "bias"):
        plain = {
            name: of[f"{name}.{kind}"].t() if kind == "weight" else of[f"{name}.{kind}"]
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }
        found |= {
            f"input_layernorm.{kind}": of[f"ln_1.{kind}"],
            f"pre_mlp_layernorm.{kind}": of[f"ln_2.{kind}"],
            f"self_attention.linear_qkv.{kind}": fused_qkv(
                *plain["attn.c_attn"].chunk(3), heads, groups
            ),
            f"self_attention.linear_proj.{kind}": plain["attn.c_proj"],
            f"mlp.linear_fc1.{kind}": plain["mlp.c_fc"],
            f"mlp.linear_fc2.{kind}": plain["mlp.c_proj"],
        }
    return found


def whole_tensors(model, *, stacked):
    """The model under core names, gate above up; layers as tensors of their own or as the first dim of one."""
    config, state = (
        model.config,
        {name: tensor.detach() for name, tensor in model.state_dict().items()},
    )
    gpt2 = config.model_type == "gpt2"
    heads = config.num_attention_heads
    layers = [
        (gpt2_layer if gpt2 else llama_layer)(
            state, layer, heads, heads if gpt2 else config.num_key_value_heads
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
    at = "transformer" if gpt2 else "model"
    outside = {
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
        ours: state[f"{at}.{theirs}"]
        for theirs, ours in outside.items()
        if f"{at}.{theirs}" in state
    }
    if not config.tie_word_embeddings:
        found["output_layer.weight"] = state["lm_head.weight"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def rank_part(name, value, rank, size):
    """What one tensor rank holds of a whole tensor."""
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
    """Transformer Engine keeps a norm inside the linear after it."""
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
    gpt2 = config.model_type == "gpt2"
    groups = config.n_head if gpt2 else config.num_key_value_heads
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
    if gpt2:
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
    """One file a rank, with what else such files hold beside the model."""
    config, state = (
        model.config,
        {name: tensor.detach() for name, tensor in model.state_dict().items()},
    )
    gpt2 = config.model_type == "gpt2"
    heads = config.num_attention_heads
    groups = heads if gpt2 else config.num_key_value_heads
    make, at = (gpt2_layer, "transformer") if gpt2 else (llama_layer, "model")
    layers = [make(state, layer, heads, groups) for layer in range(config.num_hidden_layers)]

    def pad(table):
        rows = (padded or -(-len(table) // tensor) * tensor) - len(table)
        return torch.cat([table, torch.randn(rows, table.shape[1])]) if rows else table

    words = pad(state["transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"])
    head = words if config.tie_word_embeddings else pad(state["lm_head.weight"])
    final = {
        f"final_layernorm.{kind}": state[f"{at}.{'ln_f' if gpt2 else 'norm'}.{kind}"]
        for kind in ("weight", "bias")
        if f"{at}.{'ln_f' if gpt2 else 'norm'}.{kind}" in state
    }
    count = len(layers) // (pipeline * virtual)
    with mock.patch.dict(sys.modules, MODULES):
        for rank in range(tensor):
            for stage in range(pipeline):
                chunks = []
                for chunk in range(virtual):
                    first = (chunk * pipeline + stage) * count
                    whole = {
                        f"decoder.layers.{number}.{name}": value
                        for number in range(count)
                        for name, value in layers[first + number].items()
                    }
                    if first == 0:
                        whole["embedding.word_embeddings.weight"] = words
                        if gpt2:
                            whole["embedding.position_embeddings.weight"] = state[
                                "transformer.wpe.weight"
                            ]
                    if first + count == len(layers):
                        whole |= {f"decoder.{name}": value for name, value in final.items()}
                        if not config.tie_word_embeddings or pipeline * virtual > 1:
                            whole["output_layer.weight"] = head
                    chunks.append(
                        renamed(
                            {
                                name: rank_part(name, value, rank, tensor)
                                for name, value in whole.items()
                            },
                            names,
                            config,
                        )
                    )
                content = (
                    {"model": chunks[0]}
                    if virtual == 1
                    else {f"model{number}": chunk for number, chunk in enumerate(chunks)}
                )
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
                if args:
                    content["args"] = arguments(config, tensor, pipeline, **more)
                place = folder / (
                    f"mp_rank_{rank:02d}" if pipeline == 1 else f"mp_rank_{rank:02d}_{stage:03d}"
                )
                place.mkdir(parents=True)
                torch.save(content, place / "model_optim_rng.pt")


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
