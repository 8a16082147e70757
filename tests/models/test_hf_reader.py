"""Every field of a family's config class, changed: logits equal transformers', or it is an error.

The fields are read from the class: a field that a later transformers adds fails here.
"""

import copy

import pytest
import torch
from helpers.model_variants import BASES
from helpers.networks import build, logits, make_microbatch, scramble, tokens, transformers_twin

from megatrain.errors import ConfigError
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.hf import FAMILIES, find_family
from megatrain.models.hf_reader import WITHOUT_EFFECT

# Qwen's windows need their switch before the other fields say something.
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MODELS = BASES | {name: BASES[name] | WINDOWED for name in ("qwen2", "qwen3")}

FLIPS = {
    # sizes
    "vocab_size": 71,
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 40,
    "n_inner": 40,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 2,
    "n_head": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 32,
    "n_positions": 32,
    # the maths
    "hidden_act": "relu",
    "hidden_activation": "relu",
    "activation_function": "relu",
    "rms_norm_eps": 0.3,
    "layer_norm_eps": 0.3,
    "norm_epsilon": 0.3,
    "layer_norm_epsilon": 0.3,
    "mlp_bias": True,
    "use_bias": False,
    "pretraining_tp": 2,
    "use_parallel_residual": False,
    "query_pre_attn_scalar": 7,
    "final_logit_softcapping": 0.7,
    "attn_logit_softcapping": 0.7,
    "use_bidirectional_attention": True,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "add_cross_attention": True,
    "is_encoder_decoder": True,
    # windows and positions
    "sliding_window": 3,
    "use_sliding_window": False,
    "max_window_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "original_max_position_embeddings": 8,
    # what only training sees
    "attention_dropout": 0.5,
    "attn_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "resid_pdrop": 0.5,
    "hidden_dropout": 0.5,
    "residual_dropout": 0.5,
    "embedding_dropout": 0.5,
    "initializer_range": 0.3,
    "pad_token_id": 3,
    # other heads, and what is returned
    "classifier_dropout": 0.9,
    "is_decoder": True,
    "summary_type": "mean",
    "summary_use_proj": False,
    "summary_activation": "tanh",
    "summary_proj_to_labels": False,
    "summary_first_dropout": 0.9,
    "reorder_and_upcast_attn": True,
    "use_cache": False,
    "bos_token_id": 5,
    "eos_token_id": 6,
    "architectures": ["Nonsense"],
    "transformers_version": "4.0",
    "output_hidden_states": True,
    "output_attentions": True,
    "problem_type": "regression",
    "id2label": {0: "a"},
    "label2id": {"a": 0},
    "chunk_size_feed_forward": 2,
}
NOT_FLIPPED = {
    "model_type": "another family",
    "dtype": "train.dtype says it",
    "return_dict": "transformers' own models break without",
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}
ROPES = {
    "gemma3_text": {"full_attention": LINEAR, "sliding_attention": LINEAR},
    "gpt_neox": {**LINEAR, "partial_rotary_factor": 0.5},
    "phi3": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
}


def flips(family):
    """Yields (field, other value) for every field of the family's config class."""
    config = load_hf_config(MODELS[family])
    for name in type(config)().to_dict():
        if name in ("tie_word_embeddings", "attention_bias"):
            yield name, not getattr(config, name)
        elif name == "rope_parameters":
            yield name, ROPES.get(family, LINEAR)
        elif name not in NOT_FLIPPED and not name.startswith("_"):
            assert name in FLIPS, f"{family} has a field {name} without another value in FLIPS"
            yield name, FLIPS[name]


def refused(model):
    try:
        read_config(load_hf_config(model))
    except ConfigError as error:
        return str(error)
    return None


def parameters_and_logits(config, given):
    """Returns the parameters of a transformers model, random by name, and its logits."""
    from transformers import AutoModelForCausalLM

    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return {name: p.shape for name, p in model.named_parameters()}, model(given)[0]


def differ(before, after):
    return before[0] != after[0] or not torch.equal(before[1], after[1])


@torch.no_grad()
def follows_transformers(model, given):
    layers = build(model).eval()
    scramble(layers)
    expected = transformers_twin(model, layers).float()(given)[0]
    found = logits(layers, make_microbatch(read_config(load_hf_config(model)), given))
    return torch.allclose(found, expected, rtol=2e-5, atol=2e-5)


TRAINING_ONLY = {
    "initializer_range",
    "pad_token_id",
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "hidden_dropout",
    "residual_dropout",
    "embedding_dropout",
}
"""Leave the logits alone and are in the architecture."""
NO_PADDING = {("gpt2", "pad_token_id"), ("gpt_neox", "pad_token_id")}
"""Their embeddings have no padding row."""
QUIET = {
    "max_position_embeddings": "an upper bound where positions are rotations",
    "original_max_position_embeddings": "read by longrope alone: tests/helpers/model_variants.py",
    **dict.fromkeys(
        (
            "classifier_dropout",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        ),
        "of other heads",
    ),
    "is_decoder": "which decoders are anyway",
    "reorder_and_upcast_attn": "the order of a scaling in half precision",
    "max_window_layers": "layer_types are made of it when the config is made",
}


@pytest.mark.parametrize("family", MODELS)
def test_each_field_is_used_or_refused(family):
    given = tokens()
    before = parameters_and_logits(load_hf_config(MODELS[family]), given)
    for name, value in flips(family):
        model = copy.deepcopy(MODELS[family]) | {name: value}
        refusal = refused(model)
        if refusal is not None:
            assert name in refusal, f"{name}={value} is refused without its name: {refusal}"
            continue
        assert follows_transformers(model, given), f"{name}={value}"
        if differ(before, parameters_and_logits(load_hf_config(model), given)):
            assert name not in WITHOUT_EFFECT, f"{name} changes the maths"
            continue
        honoured = read_config(load_hf_config(model)) != read_config(load_hf_config(MODELS[family]))
        expected = name in TRAINING_ONLY and (family, name) not in NO_PADDING
        assert honoured if expected else name in WITHOUT_EFFECT or name in QUIET, (
            f"{name}={value} changes nothing"
        )


OLD = {
    "rope_theta": 50.0,
    "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    "rotary_emb_base": 50.0,
    "rotary_pct": 1.0,
    "rope_local_base_freq": 50.0,
    "sliding_window_pattern": 3,
    "partial_rotary_factor": 0.5,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 2.0, 3.0, 4.0],
    "long_factor": [1.0, 3.0, 5.0, 7.0],
}
OLD_FLIPS = [
    (family, name) for family in FAMILIES for name in sorted(find_family(family).old_fields)
]


@pytest.mark.parametrize(("family", "name"), OLD_FLIPS)
def test_old_name_of_a_field_is_used(family, name):
    given = tokens()
    model = copy.deepcopy(MODELS[family]) | {
        name: LONG if (family, name) == ("phi3", "rope_scaling") else OLD[name]
    }
    assert follows_transformers(model, given)
    assert differ(
        *(
            parameters_and_logits(load_hf_config(fields), given)
            for fields in (MODELS[family], model)
        )
    )
