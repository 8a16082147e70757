"""Adapters on one rank: their target modules, shapes and dropout, and the model without them."""

from __future__ import annotations

import pytest
import torch
from helpers.networks import GPT2, LLAMA, build, loss, make_microbatch, scramble, tokens

from megatrain.config import loader as configuration
from megatrain.config.schema import LoraConfig
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.errors import ConfigError
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.lora import add_adapters, set_magnitudes, target_names


def architecture(model):
    return read_config(load_hf_config(model))


def adapted(model, **settings):
    layers = build(model)
    scramble(layers)
    add_adapters(
        layers,
        architecture(model),
        LoraConfig(rank=4, **settings),
        make_mesh(0, connect=False).tensor,
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in layers.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return layers


def test_targets_match_ends_of_names():
    llama, gpt2 = architecture(LLAMA), architecture(GPT2)
    assert target_names(llama, ["q_proj", "mlp.up_proj"]) == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert target_names(llama, ["layers.1.self_attn.o_proj"]) == {"model.layers.1.self_attn.o_proj"}
    assert len(target_names(llama, "all-linear")) == 14
    assert target_names(gpt2, "c_proj") == {
        f"transformer.h.{i}.{name}.c_proj" for i in (0, 1) for name in ("attn", "mlp")
    }


@pytest.mark.parametrize(
    "targets", [["q_proj", "w_proj"], "proj", ["lm_head"], ["embed_tokens"], ["input_layernorm"]]
)
def test_unknown_target_is_refused_with_the_available_modules(targets):
    with pytest.raises(
        ConfigError,
        match=r"matches no linear .* the modules are "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
    ):
        target_names(architecture(LLAMA), targets)


def test_a_fused_module_has_one_pair():
    trained = [
        (d.name, d.shape, p)
        for d, p in parameters(adapted(GPT2, targets=["c_attn"]))
        if p.requires_grad
    ]
    first = "base_model.model.transformer.h.0.attn.c_attn"
    assert [
        (shape, tuple(p.shape)) for name, shape, p in trained if name == f"{first}.lora_A.weight"
    ] == [((4, 32), (4, 32))]
    assert [
        (shape, tuple(p.shape)) for name, shape, p in trained if name == f"{first}.lora_B.weight"
    ] == [((96, 4), (32, 4))] * 3


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_disabled_adapters_leave_the_base_model(model, dora):
    plain = build(model)
    scramble(plain)
    layers = adapted(model, dora=dora)
    given = make_microbatch(architecture(model), tokens())
    with_adapters = loss(layers, given)
    given.adapters = False
    torch.testing.assert_close(
        loss(layers, given),
        loss(plain, make_microbatch(architecture(model), tokens())),
        rtol=1e-6,
        atol=0,
    )
    assert abs(with_adapters - loss(layers, given)) > 1e-2


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_do_not_change_the_loss(dora):
    layers = build(LLAMA)
    scramble(layers)
    before = loss(layers, make_microbatch(architecture(LLAMA), tokens()))
    add_adapters(
        layers,
        architecture(LLAMA),
        LoraConfig(rank=4, dora=dora),
        make_mesh(0, connect=False).tensor,
    )
    for spec, parameter in parameters(layers):
        if parameter.requires_grad:
            parameter.data.normal_() if "lora_A" in spec.name else parameter.data.zero_()
    set_magnitudes(layers)
    torch.testing.assert_close(
        loss(layers, make_microbatch(architecture(LLAMA), tokens())), before, rtol=1e-6, atol=0
    )


def test_dropout_depends_on_the_key_and_applies_in_training_only():
    def once(key: int | None, *, train: bool) -> float:
        layers = adapted(LLAMA, dropout=0.5).train(train)
        return loss(layers, make_microbatch(architecture(LLAMA), tokens(), dropout_key=key)).item()

    assert once(1, train=True) == once(1, train=True)
    assert once(1, train=True) != once(2, train=True)
    assert (
        once(None, train=False)
        == loss(adapted(LLAMA).eval(), make_microbatch(architecture(LLAMA), tokens())).item()
    )


@pytest.mark.parametrize(
    ("lora", "more", "words"),
    [
        (
            {"rank": 4},
            {"init_from": None},
            "lora.rank=4 requires train.init_from",
        ),
        ({"rank": -1}, {}, "lora.rank=-1 must be at least 0"),
        ({"alpha": 8}, {}, "lora.alpha=8.0 has no effect with lora.rank=0"),
        ({"rank": 4, "alpha": 0}, {}, "lora.alpha=0.0 must be above"),
        ({"rank": 4, "dropout": 1.0}, {}, "lora.dropout=1.0 must be in"),
        ({"rank": 4, "targets": []}, {}, "must name at least one module"),
        ({"rank": 4, "target": "q_proj"}, {}, "did you mean `targets`"),
    ],
)
def test_settings_are_used_or_refused(lora, more, words):
    with pytest.raises(ConfigError, match=words):
        configuration.check(
            configuration.from_dict(
                {"lora": lora, "train": {"steps": 1, "init_from": "folder"} | more}
            )
        )
