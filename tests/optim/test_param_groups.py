"""Weight decay groups, and torch's fused update rules."""

import pytest
import torch

from megatrain.config import loader as configuration
from megatrain.config.loader import Config
from megatrain.config.schema import OptimizerConfig
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import shard_spec
from megatrain.models.config import load_hf_config, read_config
from megatrain.optim.param_groups import LANES, decay_groups, lane_padding, make_optimizer
from megatrain.pipeline.stage_builder import build_stage

LLAMA = {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MATRICES = {
    "qwen2": {
        f"model.layers.0.{name}.weight"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    },
    "gpt2": {
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
}
EMBEDDINGS = {
    "qwen2": {"model.embed_tokens.weight", "lm_head.weight"},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
}


def layers(model):
    return build_stage(
        Config(), read_config(load_hf_config(model)), make_mesh(0, connect=False), "cpu"
    )


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["qwen2", "gpt2"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_matrices_decay_and_embeddings_optionally(model, embeddings):
    module = layers(model)
    groups = decay_groups(
        module.parameters(), OptimizerConfig(weight_decay=0.3, decay_embeddings=embeddings)
    )
    by_decay = {
        group["weight_decay"]: {shard_spec(p).name for p in group["params"]} for group in groups
    }
    name = model["model_type"]
    assert by_decay[0.3] == MATRICES[name] | (EMBEDDINGS[name] if embeddings else set())
    assert by_decay[0.3].isdisjoint(by_decay[0.0])
    assert by_decay[0.3] | by_decay[0.0] == {shard_spec(p).name for p in module.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_settings_reach_the_update_rule(name):
    config = OptimizerConfig(
        name=name, lr=0.5, betas=[0.7, 0.8], eps=0.01, momentum=0.6, weight_decay=0.3
    )
    optimizer = make_optimizer(decay_groups(layers(GPT2).parameters(), config), config)
    group = optimizer.param_groups[0]
    expected = {"lr": 0.5, "weight_decay": 0.3}
    expected |= {"momentum": 0.6} if name == "sgd" else {"betas": (0.7, 0.8)}
    expected |= {"eps": 0.01} if name.startswith("adam") else {}
    assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_updates_of_full_registers_do_not_depend_on_position(name):
    weights, *gradients = torch.randn(6, 256 * LANES, generator=torch.Generator().manual_seed(0))

    def updated(size):
        parts = [torch.nn.Parameter(part.clone()) for part in weights.split(size)]
        optimizer = make_optimizer(
            [{"params": parts, "weight_decay": 0.1}], OptimizerConfig(name=name, lr=0.01)
        )
        for gradient in gradients:
            for part, grad in zip(parts, gradient.split(size), strict=True):
                part.grad = grad.clone()
            optimizer.step()
        return torch.cat([part.detach() for part in parts])

    whole = updated(weights.numel())
    assert all(whole.equal(updated(count * LANES)) for count in (1, 3, 64))


@pytest.mark.parametrize(("tied", "pipeline"), [(True, 2), (True, 1), (False, 2)])
def test_shards_of_a_matrix_at_both_ends_fill_registers(tied, pipeline):
    model = {**LLAMA, "hidden_size": 20, "tie_word_embeddings": tied}
    module = build_stage(
        configuration.from_dict({"parallel": {"pipeline": pipeline}}),
        read_config(load_hf_config({**model, "num_hidden_layers": 2})),
        make_mesh(0, pipeline=pipeline, connect=False),
        "cpu",
    )
    matrices, others = (
        group["params"] for group in decay_groups(module.parameters(), OptimizerConfig())
    )
    assert lane_padding(others, shards=3) == 0
    padding = lane_padding(matrices, shards=3)
    assert (padding > 0) == (tied and pipeline > 1)
    assert not padding or (sum(p.numel() for p in matrices) + padding) % (3 * LANES) == 0
