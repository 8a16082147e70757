"""Rotary positions and their scalings against transformers' own."""

import math

import pytest
import torch
from helpers.networks import LLAMA

from megatrain.models.config import load_hf_config, read_config
from megatrain.models.rope import frequencies, make_rotation
from megatrain.ops.rope import rotate

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotated_queries_equal_transformers(name):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    architecture = read_config(
        load_hf_config({**LLAMA, "head_dim": 16, "rope_parameters": SCALINGS[name]})
    )
    positions = torch.stack([torch.arange(40), torch.cat([torch.arange(25), torch.arange(15)])])
    q = torch.randn(
        40, 2, 4, 16, generator=torch.Generator().manual_seed(0)
    )  # [S, B, heads, head_dim]
    cos, sin = LlamaRotaryEmbedding(architecture.config)(q, positions)
    expected, _ = apply_rotary_pos_emb(q.permute(1, 2, 0, 3), q.permute(1, 2, 0, 3), cos, sin)
    found = rotate(
        q, make_rotation(positions, *frequencies(architecture, length=40), torch.float32)
    )
    torch.testing.assert_close(found.permute(1, 2, 0, 3), expected, rtol=1e-5, atol=1e-5)


def test_scaling_types_give_different_frequencies():
    found = {
        name: frequencies(
            read_config(load_hf_config({**LLAMA, "head_dim": 16, "rope_parameters": scaling})),
            length=40,
        )[0]
        for name, scaling in SCALINGS.items()
    }
    torch.testing.assert_close(found["linear"] * 4, found["default"])
    assert not torch.allclose(found["llama3"], found["theta"])
    assert torch.equal(found["llama3"][0], found["theta"][0]), "the fastest pair is left alone"
    torch.testing.assert_close(
        found["dynamic"], found["default"]
    )  # within the positions that the model is made for


def test_longrope_uses_long_factors_in_long_sequences():
    architecture = read_config(
        load_hf_config({**LLAMA, "head_dim": 16, "rope_parameters": SCALINGS["longrope"]})
    )
    short, long = (frequencies(architecture, length=length) for length in (32, 33))
    factors = {
        name: torch.tensor(SCALINGS["longrope"][f"{name}_factor"]) for name in ("short", "long")
    }
    torch.testing.assert_close(short.inv_freq * factors["short"], long.inv_freq * factors["long"])
    assert short.factor == long.factor == pytest.approx((1 + math.log(4) / math.log(32)) ** 0.5)


def test_partial_rotary_leaves_the_rest_of_a_head():
    positions, x = torch.arange(5)[None], torch.randn(5, 2, 3, 6)
    rotation = make_rotation(positions, torch.tensor([1.0, 0.1]), 1.0, torch.float32)
    y = rotate(x, rotation)
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[..., :4], rotate(x[..., :4].contiguous(), rotation))


def test_backward_passes_gradcheck():
    positions = torch.arange(5)[None]
    rotation = make_rotation(positions, torch.tensor([1.0, 0.1, 0.01]), 1.5, torch.float64)
    x = torch.randn(5, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), (x,))


def test_angles_are_exact_at_far_positions_in_bf16():
    """Angles in bf16 would be off by a whole turn here."""
    positions = torch.tensor([[100_000, 100_001]])
    rotation = make_rotation(positions, torch.tensor([1.0]), 1.0, torch.bfloat16)
    assert rotation.cos.dtype == torch.bfloat16
    torch.testing.assert_close(
        rotation.cos[:, 0, 0, 0].double(), positions[0].double().cos(), rtol=0, atol=0.01
    )
