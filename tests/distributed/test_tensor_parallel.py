"""Split layers against torch's whole ones."""

import pytest
import torch
import torch.nn.functional as F
from helpers.rank_pool import run_ranks
from torch import nn

from megatrain.distributed import cross_entropy
from megatrain.distributed.cross_entropy import vocab_parallel_cross_entropy
from megatrain.distributed.mesh import MeshAxis, make_mesh
from megatrain.distributed.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

ALONE = MeshAxis(0, 1, (0,))
VOCABULARY, HIDDEN, PADDING = 67, 6, 40
ROWS = cross_entropy.ROWS + 88


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels():
    found = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(1))
    found[::7] = -100
    found[:3] = torch.tensor([0, 33, 66])
    return found


def logits():
    """Returns logits of which some are so large that only a shifted softmax is finite."""
    return randn(ROWS, VOCABULARY, seed=2) * 50


def tokens():
    found = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(3))
    found[0, :4] = torch.tensor([PADDING, 0, 33, 66])
    return found


def on_ranks(rank, world_size):
    axis = make_mesh(rank, tensor=world_size).tensor
    half = 34
    results = {}
    # Columns behind the vocabulary hold anything.
    mine = (
        torch.cat([logits(), torch.full((ROWS, 1), 1e4)], dim=1)[:, rank * half : (rank + 1) * half]
        .contiguous()
        .requires_grad_()
    )
    losses = vocab_parallel_cross_entropy(
        mine.clone(), labels(), start=rank * half, vocab_size=VOCABULARY, axis=axis
    )
    losses.backward(randn(ROWS, seed=4))
    results["cross entropy"] = losses.detach(), mine.grad
    table = torch.cat([randn(VOCABULARY, HIDDEN, seed=5), torch.zeros(1, HIDDEN)])[
        rank * half : (rank + 1) * half
    ]
    for sequence in (False, True):
        weight = nn.Parameter(table.clone())
        rows = VocabParallelEmbedding(
            weight, start=rank * half, axis=axis, sequence=sequence, padding_token=PADDING
        )(tokens())
        gradient = randn(8, 2, HIDDEN, seed=6)
        rows.backward(gradient.chunk(2)[rank] if sequence else gradient)
        results[f"embedding, sequence={sequence}"] = rows.detach(), weight.grad
        part = nn.Parameter(randn(5, 8, seed=7).chunk(2, dim=1)[rank].contiguous())
        bias = nn.Parameter(randn(5, seed=8))
        y = RowParallelLinear(part, bias, axis=axis, sequence=sequence)(
            randn(4, 2, 8, seed=9).chunk(2, dim=-1)[rank]
        )
        results[f"rows, sequence={sequence}"] = y.detach(), None
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(on_ranks, 2, folder=tmp_path_factory.mktemp("ranks"))


def reference():
    x = logits().requires_grad_()
    losses = F.cross_entropy(x, labels(), reduction="none")
    losses.backward(randn(ROWS, seed=4))
    return losses.detach(), x.grad


def test_cross_entropy_on_one_rank_equals_torch():
    x = logits().requires_grad_()
    losses = vocab_parallel_cross_entropy(
        x.clone(), labels(), start=0, vocab_size=VOCABULARY, axis=ALONE
    )
    losses.backward(randn(ROWS, seed=4))
    expected, gradient = reference()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, gradient, rtol=1e-5, atol=1e-6)
    assert (losses[labels() < 0] == 0).all()
    assert (x.grad[labels() < 0] == 0).all()


def test_cross_entropy_on_two_ranks_equals_torch(results):
    expected, gradient = reference()
    parts = []
    for losses, part in (rank["cross entropy"] for rank in results):
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        parts.append(part)
    whole = torch.cat(parts, dim=1)
    torch.testing.assert_close(whole[:, :VOCABULARY], gradient, rtol=1e-5, atol=1e-6)
    assert (whole[:, VOCABULARY:] == 0).all(), "padding gets no gradient"


def test_cross_entropy_of_bf16_is_computed_in_fp32():
    x = (logits() / 10).bfloat16()
    wide = x.float().requires_grad_()
    F.cross_entropy(wide, labels(), reduction="sum").backward()
    given = x.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(
        given.clone(), labels(), start=0, vocab_size=VOCABULARY, axis=ALONE
    )
    losses.sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses, F.cross_entropy(x.float(), labels(), reduction="none"), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(given.grad.float(), wide.grad, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("sequence", [False, True])
def test_split_embedding_ignores_the_padding_token(results, sequence):
    weight = randn(VOCABULARY, HIDDEN, seed=5).requires_grad_()
    expected = F.embedding(tokens().t(), weight, padding_idx=PADDING)
    expected.backward(randn(8, 2, HIDDEN, seed=6))
    outputs = [rank[f"embedding, sequence={sequence}"][0] for rank in results]
    torch.testing.assert_close(torch.cat(outputs) if sequence else outputs[0], expected)
    assert sequence or torch.equal(outputs[0], outputs[1])
    gradient = torch.cat([rank[f"embedding, sequence={sequence}"][1] for rank in results])
    torch.testing.assert_close(gradient[:VOCABULARY], weight.grad)
    assert (gradient[PADDING] == 0).all()
    assert (weight.grad.abs().sum(1) > 0).sum() > 3


@pytest.mark.parametrize("padding", [None, PADDING])
def test_embedding_on_one_rank_ignores_the_padding_token(padding):
    weight = nn.Parameter(randn(VOCABULARY, HIDDEN, seed=5))
    VocabParallelEmbedding(weight, start=0, axis=ALONE, sequence=False, padding_token=padding)(
        tokens()
    ).sum().backward()
    assert (weight.grad[PADDING] == 0).all() == (padding is not None)


@pytest.mark.parametrize("sequence", [False, True])
def test_row_parallel_linear_adds_its_bias_once(results, sequence):
    expected = F.linear(randn(4, 2, 8, seed=9), randn(5, 8, seed=7), randn(5, seed=8))
    outputs = [rank[f"rows, sequence={sequence}"][0] for rank in results]
    torch.testing.assert_close(torch.cat(outputs) if sequence else outputs[0], expected)


@pytest.mark.parametrize("elements", [1 << 16, 16], ids=["one-slab", "slabs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_accumulates_its_weight_gradient_in_main_grad(dtype, elements, monkeypatch):
    """The sum over several backwards is in fp32 for any dtype; autograd adds the bias's gradient.

    A product may be rounded to the dtype, as bf16 units do. The sum may not: near 1000, bf16 holds
    multiples of 4 only.
    """
    monkeypatch.setattr("megatrain.ops.row_blocks.ELEMENTS", elements)
    weight, bias = nn.Parameter(randn(5, 8).to(dtype)), nn.Parameter(randn(5, seed=1).to(dtype))
    weight.main_grad = torch.full((5, 8), 1000.0)
    layer = ColumnParallelLinear(weight, bias)
    total, rounding = torch.full((5, 8), 1000.0), torch.zeros(5, 8)
    for seed in range(3):
        x, gradient = (
            randn(7, 8, seed=10 + seed).to(dtype).requires_grad_(),
            randn(7, 5, seed=20 + seed).to(dtype),
        )
        y = layer(x)
        y.backward(gradient)
        product = gradient.float().t() @ x.detach().float()
        total += product
        rounding += product.abs() * torch.finfo(dtype).eps
        torch.testing.assert_close(y, F.linear(x, weight, bias))
        torch.testing.assert_close(x.grad, gradient @ weight)
    assert weight.grad is None
    assert ((weight.main_grad - total).abs() <= rounding + 1e-3).all()
    assert bias.grad.dtype == dtype


def test_linear_without_main_grad_equals_torch():
    weight, bias, x = (
        nn.Parameter(randn(5, 8)),
        nn.Parameter(randn(5, seed=1)),
        randn(2, 3, 8, seed=2).requires_grad_(),
    )
    ColumnParallelLinear(weight, bias)(x).square().sum().backward()
    ours = weight.grad.clone(), bias.grad.clone(), x.grad.clone()
    for tensor in (weight, bias, x):
        tensor.grad = None
    F.linear(x, weight, bias).square().sum().backward()
    for mine, theirs in zip(ours, (weight.grad, bias.grad, x.grad), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_frozen_linear_saves_nothing_and_returns_its_input_gradient():
    weight, bias = (
        nn.Parameter(randn(5, HIDDEN), requires_grad=False),
        nn.Parameter(randn(5, seed=4), requires_grad=False),
    )
    x = randn(3, 2, HIDDEN, seed=5).requires_grad_()
    y = ColumnParallelLinear(weight, bias)(x)
    assert y.grad_fn.saved_tensors == (None,)
    y.backward(randn(3, 2, 5, seed=6))
    given, x.grad = x.grad, None
    F.linear(x, weight, bias).backward(randn(3, 2, 5, seed=6))
    torch.testing.assert_close(given, x.grad)


def test_linear_of_zero_rows_has_empty_gradients():
    """A microbatch without a label has none for its head."""
    x = torch.zeros(0, HIDDEN, requires_grad=True)
    layer = ColumnParallelLinear(nn.Parameter(randn(5, HIDDEN)), nn.Parameter(randn(5)))
    layer(x).sum().backward()
    assert x.grad.shape == (0, HIDDEN)
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()
