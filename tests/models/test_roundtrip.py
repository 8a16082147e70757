"""A random tiny model of transformers, loaded into ranks of several layouts and saved, is equal."""

import pytest
import torch
from helpers.model_variants import VARIANTS
from helpers.networks import build, logits, make_microbatch, tokens
from safetensors.torch import load_file

from megatrain.config import loader as configuration
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.models.config import load_hf_config, read_config
from megatrain.pipeline.stage_builder import build_stage

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
"""Tensor and pipeline ranks; 4 tensor ranks hold copies of 2 key-value heads."""


def ranks(model, *, tensor, pipeline):
    """Yields (spec, empty parameter) for every rank."""
    config = configuration.load(
        None, ["train.steps=1", f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    )
    architecture = read_config(load_hf_config(model))
    for rank in range(tensor * pipeline):
        yield from parameters(
            build_stage(
                config,
                architecture,
                make_mesh(rank, tensor=tensor, pipeline=pipeline, connect=False),
                "cpu",
            )
        )


def theirs(model, folder):
    """Returns a random model of transformers, and the tensors it saves."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = load_hf_config(model)
    config._attn_implementation = "eager"
    network = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(
                torch.randn_like(parameter) * 0.1
            )  # also biases and norms, which start as constants
    network.save_pretrained(folder)
    return network, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_tensors_go_into_ranks_and_back_unchanged(name, tmp_path):
    network, saved = theirs(VARIANTS[name], tmp_path)
    former = read_config(load_hf_config(VARIANTS[name])).renamed_weights
    saved = {former.get(key, key): tensor for key, tensor in saved.items()}
    for tensor, pipeline in LAYOUTS:
        back = {}
        for spec, parameter in ranks(VARIANTS[name], tensor=tensor, pipeline=pipeline):
            spec.local_view(parameter).copy_(spec.shard(saved[spec.name]))
            whole = back.setdefault(spec.name, torch.full(spec.shape, float("nan")))
            if spec.is_owner:
                spec.unshard_into(spec.local_view(parameter), whole)
        assert back.keys() == saved.keys()
        assert all(torch.equal(back[key], saved[key]) for key in saved), (
            f"tensor {tensor}, pipeline {pipeline}"
        )
    layers = build(VARIANTS[name]).eval()
    for spec, parameter in parameters(layers):
        spec.local_view(parameter).copy_(spec.shard(saved[spec.name]))
    found = logits(layers, make_microbatch(read_config(load_hf_config(VARIANTS[name])), tokens()))
    torch.testing.assert_close(found, network(tokens()).logits, rtol=0, atol=1e-5)
