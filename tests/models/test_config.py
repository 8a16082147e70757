"""Fields of a Hugging Face config that change the computation act as in transformers, or raise."""

import json

import pytest
import torch
from helpers.networks import (
    GPT2,
    LLAMA,
    build,
    logits,
    make_microbatch,
    scramble,
    tokens,
    transformers_twin,
)

from megatrain.distributed.sharding import parameters
from megatrain.errors import ConfigError
from megatrain.models import hf
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.hf import register_family, supported_families
from megatrain.models.hf.llama import llama_like
from megatrain.models.hf_reader import HFConfigReader

QWEN2, QWEN3, MISTRAL = ({**LLAMA, "model_type": name} for name in ("qwen2", "qwen3", "mistral"))
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
HONOURED = [
    *[
        (LLAMA, {"hidden_act": name})
        for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "swish")
    ],
    (LLAMA, {"rms_norm_eps": 0.3}),
    (LLAMA, {"attention_bias": True}),
    (LLAMA, {"mlp_bias": True}),
    (LLAMA, {"head_dim": 16}),
    (LLAMA, {"num_key_value_heads": 1}),
    (LLAMA, {"num_key_value_heads": None}),
    (LLAMA, {"tie_word_embeddings": True}),
    (LLAMA, {"num_hidden_layers": 3}),
    (LLAMA, {"hidden_size": 64}),
    (LLAMA, {"intermediate_size": 40}),
    (LLAMA, {"rope_theta": 100.0}),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    (LLAMA, {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    (LLAMA, {"rope_parameters": LLAMA3_ROPE}),
    (MISTRAL, {"sliding_window": 5}),
    (MISTRAL, {"sliding_window": None}),
    (MISTRAL, {"head_dim": 16}),
    (QWEN2, {}),
    (QWEN2, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    (
        QWEN2,
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    (QWEN3, {"head_dim": 16}),
    (QWEN3, {"head_dim": 8, "attention_bias": True}),
    (
        QWEN3,
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    *[(GPT2, {"activation_function": name}) for name in ("gelu", "gelu_fast", "relu", "silu")],
    (GPT2, {"layer_norm_epsilon": 0.3}),
    (GPT2, {"n_inner": 40}),
    (GPT2, {"tie_word_embeddings": False}),
    (GPT2, {"n_head": 8}),
    (GPT2, {"num_hidden_layers": 3}),
    (GPT2, {"reorder_and_upcast_attn": True}),
]
# With the same weights these leave the logits of the plain model as they are.
NAMES_OF_DEFAULTS = ["swish", "reorder_and_upcast_attn", "gelu_fast"]


def named(case):
    model, fields = case
    return f"{model['model_type']}-{'-'.join(f'{k}={v}' for k, v in fields.items())}"[:90]


def ours(model):
    layers = build(model).eval()
    scramble(layers)
    with torch.no_grad():
        return layers, logits(layers, make_microbatch(read_config(load_hf_config(model)), tokens()))


@pytest.fixture(scope="module")
def plain():
    """Logits of each family before a field is changed."""
    return {model["model_type"]: ours(model)[1] for model in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)}


@pytest.mark.parametrize("case", HONOURED, ids=named)
def test_logits_follow_a_field_as_in_transformers(case, plain):
    model = case[0] | case[1]
    layers, found = ours(model)
    with torch.no_grad():
        expected = transformers_twin(model, layers)(tokens()).logits
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    same = (
        any(name in named(case) for name in NAMES_OF_DEFAULTS)
        or case == (QWEN2, {})
        or case == (MISTRAL, {"sliding_window": None})
    )
    assert torch.equal(found, plain[model["model_type"]]) == same, "the field must matter"


REFUSED = [
    (
        LLAMA,
        {"pretraining_tp": 2},
        "model.pretraining_tp=2 is not supported .supported: 1.",
    ),
    (
        LLAMA,
        {"hidden_act": "quick_gelu"},
        "model.hidden_act=quick_gelu is not supported .supported: silu",
    ),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
        "rope_parameters.rope_type=proportional is not supported .supported: default",
    ),
    (
        LLAMA,
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 1e4,
                "factor": 2.0,
                "beta_fast": 3,
            }
        },
        "beta_fast=3 is not read by rope_type=linear",
    ),
    (
        LLAMA,
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        "partial_rotary_factor=0.5 must be 1 in llama models",
    ),
    (
        LLAMA,
        {"layer_types": ["sliding_attention"] * 2},
        "model.layer_types=.* is not a field of a llama config",
    ),
    (
        LLAMA,
        {"num_key_value_heads": 3},
        "model.num_key_value_heads=3 must divide num_attention_heads=4",
    ),
    (LLAMA, {"head_dim": 7}, "even rotary dimension"),
    (
        LLAMA,
        {"pad_token_id": 67},
        "model.pad_token_id=67 is outside the vocabulary of 67",
    ),
    (LLAMA, {"attention_dropout": 1.5}, r"model's attention_dropout=1.5 must be in \[0, 1\)"),
    (LLAMA, {"vocab_size": 0}, "model.vocab_size=0 must be at least 1"),
    (LLAMA, {"num_hidden_layers": -1}, "model.num_hidden_layers=-1 must be at least 1"),
    (LLAMA, {"num_attention_heads": 0}, "model.num_attention_heads=0 must be at least 1"),
    (LLAMA, {"num_key_value_heads": 0}, "model.num_key_value_heads=0 must be at least 1"),
    (LLAMA, {"rope_theta": 0}, "model.rope_parameters.rope_theta=0 must be a number above 0"),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}},
        "model.rope_parameters.factor=nan must be a number of at least 1",
    ),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}},
        "model.rope_parameters.factor=0.5 must be a number of at least 1",
    ),
    (LLAMA, {"rms_norm_eps": -1e-5}, "model's norm_eps=-1e-05 must be at least 0"),
    (MISTRAL, {"sliding_window": 0}, "model.sliding_window=0 must be at least 1"),
    (GPT2, {"n_layer": 0}, "model.n_layer=0 must be at least 1"),
    (GPT2, {"num_attention_heads": 0}, "model.num_attention_heads=0 must be at least 1"),
    (
        MISTRAL,
        {"attention_bias": True},
        "model.attention_bias=true is not a field of a mistral config",
    ),
    (QWEN2, {"layer_types": ["chunked_attention"] * 2}, "model"),
    (
        QWEN2,
        {"layer_types": ["sliding_attention"] * 2},
        "model.layer_types=sliding_attention requires a window",
    ),
    (GPT2, {"scale_attn_weights": False}, "model.scale_attn_weights=false is not supported"),
    (
        GPT2,
        {"scale_attn_by_inverse_layer_idx": True},
        "model.scale_attn_by_inverse_layer_idx=true is not supported",
    ),
    (GPT2, {"add_cross_attention": True}, "model.add_cross_attention=true is not supported"),
    (GPT2, {"activation_function": "tanh"}, "model.activation_function=tanh is not supported"),
    (GPT2, {"n_head": 5}, "model.n_head=5 must divide n_embd=32"),
    (GPT2, {"rope_theta": 1e4}, "model.rope_theta=10000.0 is not a field of a gpt2 config"),
    (GPT2, {"resid_pdrop": -0.1}, "model's residual_dropout=-0.1 must be in"),
]


@pytest.mark.parametrize(
    ("model", "fields", "message"), REFUSED, ids=[named(case[:2]) for case in REFUSED]
)
def test_unsupported_fields_are_refused(model, fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(load_hf_config(model | fields))
    error = caught.value
    assert error.fix or error.hint or "supported:" in error.requirement


def test_a_folder_equals_inline_fields(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(load_hf_config(str(tmp_path))) == read_config(load_hf_config(LLAMA))
    assert read_config(load_hf_config(str(tmp_path / "config.json"))) == read_config(
        load_hf_config(LLAMA)
    )


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nonsense"}', "[]"])
def test_a_folder_without_a_valid_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        read_config(load_hf_config(str(tmp_path)))


def test_counts_below_one_in_a_folder_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, "n_layer": 0}))
    with pytest.raises(ConfigError, match=r"model.n_layer=0 must be at least 1"):
        read_config(load_hf_config(str(tmp_path)))


def test_config_of_a_quantised_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA, "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(ConfigError, match="quantization_config"):
        read_config(load_hf_config(str(tmp_path)))


@pytest.mark.parametrize("padding", [3, -1])
@pytest.mark.parametrize(
    "model", [LLAMA, {**LLAMA, "tie_word_embeddings": True}, QWEN3], ids=["llama", "tied", "qwen3"]
)
def test_a_padding_token_trains_as_in_transformers(model, padding):
    """Its embedding starts at zero and gets no gradient from the input."""
    model = {**model, "pad_token_id": padding}
    layers = build(model)
    embedding = layers[0].tokens.weight
    assert (embedding[padding] == 0).all()
    assert (embedding.abs().sum(1) == 0).sum() == 1
    scramble(layers)
    given = tokens()
    given[:, ::4] = padding % 67
    twin = transformers_twin(model, layers)
    (
        logits(layers, make_microbatch(read_config(load_hf_config(model)), given)) * 0.1
    ).square().sum().backward()
    (twin(given).logits * 0.1).square().sum().backward()
    theirs = twin.get_input_embeddings().weight.grad
    torch.testing.assert_close(embedding.grad, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs[padding] == 0).all() != ("tie_word_embeddings" in model)


def test_gpt2_has_no_padding_token():
    layers = build({**GPT2, "pad_token_id": 3})
    assert (layers[0].tokens.weight[3] != 0).any()


@pytest.mark.parametrize(
    "model",
    [LLAMA, QWEN2, QWEN3, GPT2, {**GPT2, "tie_word_embeddings": False}],
    ids=lambda m: m["model_type"],
)
def test_names_and_shapes_equal_transformers(model):
    layers = build(model)
    whole = {spec.name: torch.zeros(spec.shape) for spec, _ in parameters(layers)}
    for spec, _ in parameters(layers):
        spec.unshard_into(spec.shard(whole[spec.name]) + 1, whole[spec.name])
    twin = dict(transformers_twin(model, layers).named_parameters())
    assert {name: tensor.shape for name, tensor in whole.items()} == {
        name: tensor.shape for name, tensor in twin.items()
    }
    assert all((count == 1).all() for count in whole.values()), "each element is held once"


def test_inline_fields_are_not_modified():
    model = {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    load_hf_config(model)
    assert model["rope_parameters"] == {"rope_type": "linear", "factor": 2.0}


def test_an_unread_field_is_refused_unless_it_has_its_default():
    """So is a field that a later transformers adds to a config."""
    fields = HFConfigReader(load_hf_config({**LLAMA, "attention_bias": True}))
    for name in fields.config.to_dict():
        if name not in ("attention_bias", "mlp_bias"):
            fields.get(name)
    with pytest.raises(
        ConfigError,
        match=r"model\.attention_bias=true is not supported in llama models .supported: false.",
    ):
        fields.refuse_unread()
    assert fields.attention_bias
    fields.refuse_unread()  # mlp_bias has its default


def test_a_registered_family_is_read_by_its_own_reader(monkeypatch):
    monkeypatch.setattr(hf, "_registered", {})
    biased = {**LLAMA, "model_type": "llama"}
    register_family("llama", lambda fields: llama_like(fields, qkv_bias=True))
    with pytest.raises(ConfigError, match=r"model\.pretraining_tp=2 is not supported"):
        read_config(load_hf_config({**biased, "pretraining_tp": 2}))
    architecture = read_config(load_hf_config(biased))
    assert architecture.qkv_bias
    assert not architecture.out_bias


def test_a_new_model_type_can_be_registered(monkeypatch):
    """The model type has its own config class, registered with `AutoConfig.register`."""
    from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig

    class WideConfig(LlamaConfig):
        model_type = "wide_llama"

    monkeypatch.setattr(hf, "_registered", {})
    model = {**LLAMA, "model_type": "wide_llama"}
    with pytest.raises(ConfigError, match="wide_llama is not supported"):
        load_hf_config(model)
    AutoConfig.register("wide_llama", WideConfig)
    try:
        register_family("wide_llama", llama_like)
        assert supported_families() == (*hf.FAMILIES, "wide_llama")
        architecture = read_config(load_hf_config(model))
        assert architecture.model_type == "wide_llama"
        assert architecture.names == read_config(load_hf_config(LLAMA)).names
    finally:
        CONFIG_MAPPING._extra_content.pop("wide_llama")


def test_an_empty_model_type_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        register_family("", llama_like)
