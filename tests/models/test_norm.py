"""RMSNorm by slabs of rows, against double precision."""

from __future__ import annotations

import pytest
import torch

from megatrain.models.norm import RMSNorm
from megatrain.ops.row_blocks import row_blocks


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_rms_norm_over_several_slabs(dtype, bound, plus_one):
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((57, 5, 512), (512,), (57, 5, 512))
    )
    assert len(list(row_blocks(x.flatten(0, 1)))) > 1
    x.requires_grad_()
    norm = RMSNorm(torch.nn.Parameter(weight), 1e-6, plus_one=plus_one)
    norm(x).backward(grad)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.double().requires_grad_()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (wide_weight + plus_one)
    y.backward(grad.double())
    for ours, exact in ((norm(x), y), (x.grad, wide.grad), (norm.weight.grad, wide_weight.grad)):
        assert float((ours.detach() - exact.detach()).norm() / exact.detach().norm()) < bound


def test_slabs_are_all_rows_in_turn():
    x = torch.zeros(1000, 300)
    parts = [x[part].shape[0] for part in row_blocks(x)]
    assert sum(parts) == 1000
    assert len(parts) > 1
    assert list(row_blocks(x[:0])) == []
    assert next(iter(row_blocks(torch.zeros(3, 10**6)))) == slice(0, 1)
