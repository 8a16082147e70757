"""FLOPs per token against transformers' modules and numbers by hand; peaks by device name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatrain.models.counts import flops_per_token, matrix_weights, peak_flops

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
FAMILIES = {
    "llama": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 160},
    "llama tied": {
        **SMALL,
        "num_key_value_heads": 4,
        "intermediate_size": 160,
        "tie_word_embeddings": True,
    },
    "mistral": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 160, "head_dim": 32},
    "qwen2": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 160},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 160, "head_dim": 32},
    "gemma2": {
        **SMALL,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "head_dim": 32,
        "pad_token_id": None,
    },
    "gemma3_text": {
        **SMALL,
        "num_key_value_heads": 1,
        "intermediate_size": 160,
        "head_dim": 32,
        "pad_token_id": None,
    },
    "phi3": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 160, "pad_token_id": None},
    "olmo2": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 160},
    "gpt_neox": {**SMALL, "intermediate_size": 160},
    "starcoder2": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 160},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96},
    "gpt2 wide": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_inner": 100},
}


def config_of(name):
    return AutoConfig.for_model(name.split()[0], **FAMILIES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_matrix_weights_are_those_of_transformers_modules(name):
    config = config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [m.weight for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert matrix_weights(config) == sum(weight.numel() for weight in matrices)


def test_flops_exclude_gradients_of_frozen_weights():
    config = config_of("llama")
    saved = flops_per_token(config, sequence_length=32) - flops_per_token(
        config, sequence_length=32, frozen=True
    )
    assert saved == 2 * matrix_weights(config)


def test_attention_costs_half_of_the_full_matrix():
    config = config_of("llama")
    more = flops_per_token(config, sequence_length=32) - flops_per_token(config, sequence_length=0)
    # 3 layers; two products, forward and twice that backward, of width 64, over 16 of 32 tokens on
    # average.
    assert more == 3 * 2 * (2 * 64 * 16) * 3


def test_a_sliding_window_bounds_the_tokens_attended_to():
    windowed = AutoConfig.for_model("mistral", **FAMILIES["mistral"], sliding_window=4)
    free = AutoConfig.for_model("mistral", **FAMILIES["mistral"], sliding_window=None)
    # Tokens 1 to 8 attend to 1 2 3 4 4 4 4 4 tokens. The formula is continuous: 4 - 16 / 16 = 3
    # instead of 8 / 2.
    ratio = (flops_per_token(windowed, sequence_length=8) - 6 * matrix_weights(windowed)) / (
        flops_per_token(free, sequence_length=8) - 6 * matrix_weights(free)
    )
    assert ratio == 3 / 4
    assert flops_per_token(windowed, sequence_length=4) == flops_per_token(free, sequence_length=4)


def test_flops_count_windows_of_some_layers():
    """The first and the last of 3 layers of Gemma 2 have a sliding window."""
    windowed = AutoConfig.for_model("gemma2", **FAMILIES["gemma2"], sliding_window=4)
    scores = flops_per_token(windowed, sequence_length=8) - 6 * matrix_weights(windowed)
    assert scores == 12 * 4 * 32 * (3 + 4 + 3)


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA RTX A1000", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peak_flops_depend_on_device_and_dtype(device, dtype, peak):
    assert peak_flops(device, dtype) == peak
