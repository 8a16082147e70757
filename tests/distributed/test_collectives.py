"""Each collective's forward and backward, against the table in its file."""

import pytest
import torch
from helpers.rank_pool import run_ranks

from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis, make_mesh

NAMES = [
    "copy_to_tp",
    "reduce_from_tp",
    "gather_from_sp",
    "reduce_scatter_to_sp",
    "scatter_to_sp",
    "gather_to_replicated",
]
WHOLE, PART = 4, 2


def given(name, rank):
    """Returns a rank's input: a part of the sequence if the collective joins parts, else all."""
    rows = PART if name in ("gather_from_sp", "gather_to_replicated") else WHOLE
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(10 + rank))


def upstream(name, rank):
    """Returns the gradient of the output."""
    rows = PART if name in ("reduce_scatter_to_sp", "scatter_to_sp") else WHOLE
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(20 + rank))


def call_all(rank, world_size):
    axis = make_mesh(rank, tensor=world_size).tensor
    results = {}
    for name in NAMES:
        x = given(name, rank).requires_grad_()
        before = x.detach().clone()
        y = getattr(collectives, name)(x, axis)
        y.backward(upstream(name, rank))
        assert torch.equal(x.detach(), before), f"{name} changes what it is given"
        results[name] = y.detach(), x.grad
    x = torch.tensor([float(rank), 1.0])
    results["all_reduce"] = collectives.all_reduce(x, axis), x
    results["maximum"] = (
        collectives.all_reduce(
            torch.tensor([float(rank)]), axis, op=torch.distributed.ReduceOp.MAX
        ),
        x,
    )
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(call_all, 2, folder=tmp_path_factory.mktemp("ranks"))


# Of what both ranks bring, what each has afterwards.
WAYS = {
    "identity": lambda a, b: (a, b),
    "all-reduce": lambda a, b: (a + b, a + b),
    "all-gather": lambda a, b: (torch.cat([a, b]), torch.cat([a, b])),
    "reduce-scatter": lambda a, b: ((a + b)[:PART], (a + b)[PART:]),
    "own part": lambda a, b: (a[:PART], b[PART:]),
}
TABLE = {
    "copy_to_tp": ("identity", "all-reduce"),
    "reduce_from_tp": ("all-reduce", "identity"),
    "gather_from_sp": ("all-gather", "reduce-scatter"),
    "reduce_scatter_to_sp": ("reduce-scatter", "all-gather"),
    "scatter_to_sp": ("own part", "all-gather"),
    "gather_to_replicated": ("all-gather", "own part"),
}


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_equal_the_table(results, name):
    forward, backward = TABLE[name]
    outputs = WAYS[forward](given(name, 0), given(name, 1))
    gradients = WAYS[backward](upstream(name, 0), upstream(name, 1))
    for rank in (0, 1):
        torch.testing.assert_close(results[rank][name][0], outputs[rank])
        torch.testing.assert_close(results[rank][name][1], gradients[rank])


def test_all_reduce_is_in_place_and_supports_maximum(results):
    for rank in (0, 1):
        returned, x = results[rank]["all_reduce"]
        assert returned.tolist() == x.tolist() == [1.0, 2.0]
        assert results[rank]["maximum"][0].tolist() == [1.0]


@pytest.mark.parametrize("name", NAMES)
def test_collectives_of_one_rank_return_their_input(name):
    x = torch.randn(4, 3)
    assert getattr(collectives, name)(x, MeshAxis(0, 1, (0,))) is x
