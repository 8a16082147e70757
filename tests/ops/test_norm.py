"""RMSNorm by blocks of rows, against double precision and torch's kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatrain.ops.norm import rms_norm
from megatrain.ops.row_blocks import row_blocks


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_rms_norm_over_several_blocks_is_accurate(dtype, bound, plus_one):
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((57, 5, 512), (512,), (57, 5, 512))
    )
    assert len(list(row_blocks(x.flatten(0, 1)))) > 1
    x.requires_grad_()
    weight.requires_grad_()
    y = rms_norm(x, weight, 1e-6, plus_one=plus_one)
    y.backward(grad)
    wide = x.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    expected = expected * (wide_weight + plus_one)
    expected.backward(grad.double())
    for ours, exact in ((y, expected), (x.grad, wide.grad), (weight.grad, wide_weight.grad)):
        assert relative_error(ours, exact) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_rms_norm_equals_torch_kernel(dtype, bound):
    generator = torch.Generator().manual_seed(2)
    x, weight, grad = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((57, 5, 512), (512,), (57, 5, 512))
    )
    results = []
    for function in (
        lambda x, weight: rms_norm(x, weight, 1e-6),
        lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
    ):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(*inputs)
        y.backward(grad)
        results.append((y, *(tensor.grad for tensor in inputs)))
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == torchs.dtype == dtype
        assert relative_error(ours, torchs) < bound


def relative_error(found, exact):
    exact = exact.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm())


def test_row_blocks_cover_all_rows_in_order():
    x = torch.zeros(1000, 300)
    parts = [x[part].shape[0] for part in row_blocks(x)]
    assert sum(parts) == 1000
    assert len(parts) > 1
    assert list(row_blocks(x[:0])) == []
    assert next(iter(row_blocks(torch.zeros(3, 10**6)))) == slice(0, 1)
