"""Dropout masks depend on the position alone.

They are equal where tensor ranks hold copies, and independent where they hold parts.
"""

import pytest
import torch
from helpers.networks import GPT2, LLAMA, build, loss, make_microbatch, scramble, tokens

from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.params import ParamFactory
from megatrain.models.transformer import ResidualDropout
from megatrain.ops.random import dropout, random_key

DROPPING = {**GPT2, "attn_pdrop": 0.1, "embd_pdrop": 0.2, "resid_pdrop": 0.3}
ONES = torch.ones(64, 64)


def test_mask_depends_on_its_key_only():
    assert torch.equal(dropout(ONES, 0.5, 7, training=True), dropout(ONES, 0.5, 7, training=True))
    assert not torch.equal(
        dropout(ONES, 0.5, 7, training=True), dropout(ONES, 0.5, 8, training=True)
    )
    assert dropout(ONES, 0.5, 7, training=False) is ONES
    assert dropout(ONES, 0.0, 7, training=True) is ONES


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_kept_elements_are_scaled_and_have_the_expected_share(probability):
    y = dropout(torch.ones(400, 400), probability, 3, training=True)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - probability)))
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - probability)) < 5 * deviation


def test_keys_differ_by_step_microbatch_layer_and_rank():
    places = [
        (seed, step, microbatch, place, layer, rank)
        for seed in (1, 2)
        for step in (1, 11)
        for microbatch in (1, 12)
        for place in ("attention", "feedforward")
        for layer in (0, 1)
        for rank in (None, 0, 1)
    ]
    keys = [random_key("dropout", random_key(*place[:3]), *place[3:]) for place in places]
    assert len(set(keys)) == len(places)
    assert random_key(1, 11) != random_key(11, 1)
    assert random_key("1", "12") != random_key("11", "2")
    assert all(0 <= k < 2**63 for k in keys)


def residuals(sequence):
    """Returns ones after the dropout of a residual branch, on each of two tensor ranks."""
    architecture = read_config(load_hf_config(DROPPING))
    outputs = []
    for rank in (0, 1):
        params = ParamFactory(
            architecture,
            make_mesh(rank, tensor=2, connect=False),
            sequence=sequence,
            dtype=torch.float32,
            device="cpu",
        )
        outputs.append(
            ResidualDropout(params, 0.5, "attention", 0).train()(
                ONES, make_microbatch(architecture, tokens(), dropout_key=9)
            )
        )
    return outputs


def test_replicated_tensors_share_a_mask_and_shards_have_independent_masks():
    first, second = residuals(sequence=False)
    assert torch.equal(first, second)
    first, second = residuals(sequence=True)
    agreeing = float(((first != 0) == (second != 0)).float().mean())
    assert abs(agreeing - 0.5) < 5 * 0.5 / 64


def run(model, recompute="none", *, dropout_key=9, training=True):
    layers = build(model, recompute=recompute).train(training)
    scramble(layers)
    total = loss(
        layers,
        make_microbatch(read_config(load_hf_config(model)), tokens(), dropout_key=dropout_key),
    )
    total.backward()
    return float(total.detach()), [parameter.grad for _, parameter in parameters(layers)]


@pytest.mark.parametrize(
    "model", [DROPPING, {**LLAMA, "attention_dropout": 0.2}], ids=["gpt2", "llama"]
)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_forward_uses_the_same_mask(model, recompute):
    plain, gradients = run(model)
    again, same = run(model, recompute)
    assert plain == again
    for one, other in zip(gradients, same, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert plain != run(model, dropout_key=10)[0]


@pytest.mark.parametrize("field", ["attn_pdrop", "embd_pdrop", "resid_pdrop"])
def test_each_probability_applies_in_training_only(field):
    model = {**GPT2, field: 0.5}
    assert run(model)[0] != run(GPT2)[0]
    assert run(model, training=False)[0] == run(GPT2, training=False)[0]


def test_unfused_attention_equals_torch_kernel():
    """The two paths differ by the dropout alone: as its probability goes to nothing they meet."""
    assert run({**LLAMA, "attention_dropout": 1e-9})[0] == pytest.approx(run(LLAMA)[0], rel=1e-5)
