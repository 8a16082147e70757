"""The backward of causal attention by blocks, against double precision and torch's backward."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import LLAMA, build, loss, make_microbatch, scramble, tokens

from megatrain.distributed.sharding import parameters
from megatrain.models import attention
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.rope import rotations
from megatrain.ops import cpu_attention
from megatrain.ops.cpu_attention import causal_attention, supports


def inputs(
    batch: int, heads: int, groups: int, length: int, dim: int, *, size: float = 1.0
) -> list[torch.Tensor]:
    """Returns query, key and value, and the gradient of the output.

    They are [B, heads, S, d], as views of [S, B, heads, d].
    """
    generator = torch.Generator().manual_seed(length + heads)
    made = [
        torch.randn(length, batch, count, dim, generator=generator)
        for count in (heads, groups, groups, heads)
    ]
    made[0] *= size
    return [x.bfloat16().permute(1, 2, 0, 3) for x in made]


def gradients(attend, tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in tensors[:3])
    y = attend(q, k, v)
    y.backward(tensors[3].to(dtype))
    return [y.detach(), q.grad, k.grad, v.grad]


def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, compile: bool = False
) -> torch.Tensor:
    return causal_attention(q, k, v, q.shape[-1] ** -0.5, compile=compile)


@pytest.mark.parametrize("size", [1.0, 8.0], ids=["small-scores", "large-scores"])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 16), (2, 2, 24), (6, 1, 8)])
def test_gradients_are_accurate_to_rounding(heads, groups, dim, size):
    tensors = inputs(2, heads, groups, 512, dim, size=size)
    exact = gradients(torchs, tensors, torch.float64)
    errors = {}
    contenders = {"torch": torchs, "ours": ours} | (
        {"compiled": partial(ours, compile=True)} if shutil.which("g++") else {}
    )
    for name, attend in contenders.items():
        found = gradients(attend, tensors, torch.bfloat16)
        errors[name] = [
            float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)
        ]
    for name in contenders:
        assert errors[name][0] == errors["torch"][0]
        assert max(errors[name]) < 0.012, errors


def test_many_scores_are_computed_a_few_groups_of_heads_at_a_time(monkeypatch):
    tensors = inputs(3, 4, 4, 512, 16)
    whole = gradients(ours, tensors, torch.bfloat16)
    monkeypatch.setattr(cpu_attention, "SCORES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for x, y in zip(gradients(ours, tensors, torch.bfloat16), whole, strict=True):
        assert torch.equal(x, y)


def test_supports_rejects_other_inputs():
    q, k, _, _ = inputs(1, 4, 2, 512, 8)
    assert not supports(q.float(), k.float())
    assert not supports(q[:, :, :500], k[:, :, :500])
    assert not supports(q[:, :, :128], k[:, :, :128])
    long = q.expand(1, 4, 512, 8).repeat(1, 1, 4, 1)
    assert not supports(long, long[:, :2])


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_model_uses_the_kernel_for_causal_masks_only(recompute, masked, monkeypatch):
    # Also on CPUs without bf16 units.
    monkeypatch.setattr(cpu_attention, "lacks_native_bf16", lambda device: False)
    monkeypatch.setattr(attention, "to_matmul_dtype", lambda x: x)
    backwards = []
    monkeypatch.setattr(
        cpu_attention,
        "_backward",
        lambda *tensors, real=cpu_attention._backward, **more: (
            backwards.append(1),
            real(*tensors, **more),
        )[1],
    )
    model = {**LLAMA, "max_position_embeddings": 256}
    architecture, given = read_config(load_hf_config(model)), tokens(rows=2, length=256)
    documents = (torch.arange(256) >= 100).long().expand_as(given) if masked else None
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layers = build(model, recompute=recompute)
        scramble(layers)
        layers.to(dtype)
        microbatch = make_microbatch(architecture, given, documents=documents)
        microbatch.rotations = rotations(microbatch.positions, architecture, dtype)
        loss(layers, microbatch).backward()
        found.append({spec.name: parameter.grad.float() for spec, parameter in parameters(layers)})
    assert bool(backwards) != masked
    for name, exact in found[0].items():
        assert float((found[1][name] - exact).norm() / exact.norm()) < 0.05, name
