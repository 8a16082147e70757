"""Initial weights are independent of the layout: parts of ranks are slices of the same tensors."""

import tracemalloc
from dataclasses import replace

import pytest
import torch
from helpers.model_variants import BASES
from helpers.networks import GPT2, LLAMA

from megatrain.config import loader as configuration
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters, shard_spec
from megatrain.models.config import WeightName, load_hf_config, read_config
from megatrain.models.init import initialize
from megatrain.models.params import ParamFactory
from megatrain.ops.random import normal_slice
from megatrain.pipeline.stage_builder import build_stage

MODELS = {
    "llama": {**LLAMA, "pad_token_id": 66},
    "tied": {**LLAMA, "tie_word_embeddings": True, "num_hidden_layers": 4},
    "gpt2": {**GPT2, "n_layer": 4},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    **{name: BASES[name] for name in ("gemma2", "phi3", "olmo2", "gpt_neox")},
}


def pieces(model, *, tensor, pipeline, seed=3):
    """Yields (spec, parameter) for every rank."""
    words = ["train.steps=1", f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    config = configuration.load(None, words)
    for rank in range(tensor * pipeline):
        stage = build_stage(
            config,
            read_config(load_hf_config(model)),
            make_mesh(rank, tensor=tensor, pipeline=pipeline, connect=False),
            "cpu",
        )
        initialize(stage, seed)
        yield from parameters(stage)


def whole(model, seed=3):
    tensors = {}
    for spec, parameter in pieces(model, tensor=1, pipeline=1, seed=seed):
        spec.unshard_into(
            spec.local_view(parameter.detach()),
            tensors.setdefault(spec.name, torch.full(spec.shape, float("nan"))),
        )
    return tensors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_shards_are_slices_of_the_full_tensor(name, tensor, pipeline):
    tensors = whole(MODELS[name])
    counted = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    for spec, parameter in pieces(MODELS[name], tensor=tensor, pipeline=pipeline):
        part = spec.local_view(parameter.detach())
        assert torch.equal(part, spec.shard(tensors[spec.name])), spec.name
        spec.unshard_into(
            spec.shard(counted[spec.name]) + spec.is_owner,
            counted[spec.name],
        )
        assert parameter.numel() == part.numel() or (parameter[spec.length :] == 0).all(), (
            "padding is zero"
        )
    assert all((count == 1).all() for count in counted.values()), (
        "one rank of a replica counts each element"
    )


@pytest.mark.parametrize("name", MODELS)
def test_values_follow_the_initialisation_of_the_architecture(name):
    """Weights are normal with the config's deviation; norms are 1 and biases 0.

    GPT-2 scales the ends of branches.
    """
    model = MODELS[name]
    residual = 0.02 / (2 * model["n_layer"]) ** 0.5 if name == "gpt2" else 0.02
    for key, tensor in whole(model).items():
        if tensor.dim() == 1:
            assert (
                tensor == (0.0 if key.endswith("bias") or name == "gemma2" else 1.0)
            ).all()  # Gemma's norms add one to theirs
            continue
        padding = model.get("pad_token_id", 1 if name == "olmo2" else None)
        if padding is not None and "embed" in key:
            assert (tensor[padding] == 0).all()
            tensor = torch.cat([tensor[:padding], tensor[padding + 1 :]])
        std = residual if "c_proj" in key else 0.02
        assert abs(float(tensor.std()) / std - 1) < 4 / (2 * tensor.numel()) ** 0.5
        assert abs(float(tensor.mean())) < 4 * std / tensor.numel() ** 0.5


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_roles_that_alternate_by_key_value_head_are_the_complete_tensor(tensor):
    """Megatron-LM stores two queries, a key and a value for each of 2 heads.

    Each of 4 ranks holds half of a group.
    """
    roles = ("query", "key", "value")
    plain = read_config(load_hf_config(LLAMA))
    fused = replace(
        plain,
        names=plain.names
        | {role: WeightName("layers.{}.qkv", roles, by_head=True) for role in roles},
    )
    places = torch.full((fused.head_dim * 8, 32), -1)
    for rank in range(tensor):
        params = ParamFactory(
            fused,
            make_mesh(rank, tensor=tensor, connect=False),
            sequence=False,
            dtype=torch.float32,
            device="meta",
        )
        for number, role in enumerate(roles):
            spec = shard_spec(params.column_parallel(role, 0, bias=False)[0])
            there = spec.shard(places)
            assert ((there == -1) | ((there == number) & (role != "query"))).all(), (
                "only keys and values have copies"
            )
            spec.unshard_into(torch.full_like(there, number), places)
    assert (
        places[:, 0].view(2, 4, fused.head_dim).tolist()
        == [[[0] * fused.head_dim] * 2 + [[1] * fused.head_dim, [2] * fused.head_dim]] * 2
    )


def test_values_differ_by_seed_and_name():
    first, second = whole(LLAMA), whole(LLAMA, seed=4)
    matrices = [key for key in first if first[key].dim() == 2]
    assert all(not torch.equal(first[key], second[key]) for key in matrices)
    values = {float(first[key][0, 0]) for key in matrices}
    assert len(values) == len(matrices)


def test_slice_equals_the_slice_of_the_full_tensor():
    shape = (37, 21)
    all_of_it = normal_slice(1, "name", shape, (slice(0, 37), slice(0, 21)), std=2.0)
    for rows, columns in [
        (slice(5, 9), slice(0, 21)),
        (slice(0, 37), slice(3, 4)),
        (slice(36, 37), slice(20, 21)),
    ]:
        assert torch.equal(
            normal_slice(1, "name", shape, (rows, columns), std=2.0), all_of_it[rows, columns]
        )
    vector = normal_slice(1, "name", (37,), (slice(0, 37),), std=1.0)
    assert torch.equal(normal_slice(1, "name", (37,), (slice(30, 37),), std=1.0), vector[30:])


@pytest.mark.parametrize(
    "part",
    [(slice(10_000, 15_000), slice(0, 64)), (slice(0, 40_000), slice(8, 16))],
    ids=["rows", "columns"],
)
def test_slice_takes_memory_of_its_own_size(part, monkeypatch):
    """An eighth of 10 MB, and a block's working room."""
    monkeypatch.setattr("megatrain.ops.random.CHUNK_ELEMENTS", 1 << 12)
    shape = (40_000, 64)
    tracemalloc.start()
    try:
        made = normal_slice(1, "name", shape, part, std=1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.nbytes == 40_000 * 64 * 4 // 8
    assert peak < 1.5 * made.nbytes


def test_initial_values_never_change():
    """A run that is started again years later starts from the same weights."""
    found = normal_slice(
        1234, "model.embed_tokens.weight", (4, 8), (slice(0, 2), slice(0, 3)), std=1.0
    )
    torch.testing.assert_close(
        found,
        torch.tensor([[0.67740685, -0.22582877, 1.34072912], [1.01881337, 1.23567104, 0.23988722]]),
        rtol=1e-6,
        atol=1e-6,
    )
