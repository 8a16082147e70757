"""Each family and its variants against transformers in fp32: logits, loss and every gradient."""

import pytest
import torch
from helpers.model_variants import VARIANTS
from helpers.networks import (
    build,
    logits,
    loss,
    make_microbatch,
    scramble,
    tokens,
    transformers_twin,
)

from megatrain.distributed.sharding import parameters
from megatrain.models.config import load_hf_config, read_config


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients_equal_transformers(name, record_property):
    model = VARIANTS[name]
    architecture = read_config(load_hf_config(model))
    layers = build(model)
    scramble(layers)
    twin = transformers_twin(model, layers)
    given, labels = tokens(), tokens(1)
    with torch.no_grad():
        expected = twin(given).logits
        off = float((logits(layers, make_microbatch(architecture, given)) - expected).abs().max())
    assert off <= 1e-5, f"of logits up to {expected.abs().max()}"
    ours = loss(layers, make_microbatch(architecture, given, labels)) / labels.numel()
    ours.backward()
    theirs = torch.nn.functional.cross_entropy(twin(given).logits.flatten(0, 1), labels.flatten())
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    worst = worst_gradient(layers, dict(twin.named_parameters()))
    assert worst < 1e-5
    record_property(
        "figures",
        f"max logit difference {off:.1e} of {float(expected.abs().max()):.1f}, "
        f"worst gradient {worst:.1e}",
    )


def worst_gradient(layers, theirs) -> float:
    """Returns the largest relative norm of a difference of gradients.

    Every element of every gradient comes from one of our parameters.
    """
    whole = {name: torch.full_like(p, float("nan")) for name, p in theirs.items()}
    for spec, parameter in parameters(layers):
        spec.unshard_into(spec.local_view(parameter.grad), whole[spec.name])
    assert not any(gradient.isnan().any() for gradient in whole.values())
    return max(float((whole[name] - p.grad).norm() / p.grad.norm()) for name, p in theirs.items())
