"""Steps of every ZeRO stage equal plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from helpers.rank_pool import run_ranks
from torch import nn

from megatrain.config import loader as configuration
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import ShardSpec, set_shard_spec
from megatrain.ops.dtypes import DTYPES
from megatrain.optim.lion import Lion
from megatrain.optim.param_groups import STATES
from megatrain.optim.zero import ZeroOptimizer

# Odd sizes: the shares of two ranks end inside a parameter, and need padding.
SHAPES = {"embedding": (11, 5), "matrix": (7, 5), "bias": (7,), "norm": (5,)}
LRS = [0.01, 0.02, 0.03, 0.02, 0.01, 0.01]
MICROBATCHES, CLIP, DECAY = 2, 8.0, 0.1
OVERFLOWS, DISCARDED = 2, 3
"""A step with a non-finite gradient on the last rank; a step with discarded gradients before it."""


class Tiny(nn.Module):
    """A stage whose gradients are the arguments of its forward."""

    def __init__(self):
        super().__init__()
        for kind, shape in SHAPES.items():
            values = (
                torch.randn(shape, generator=torch.Generator().manual_seed(len(kind)))
                .bfloat16()
                .float()
            )
            set_shard_spec(parameter := nn.Parameter(values), ShardSpec(kind, shape, kind=kind))
            self.register_parameter(kind, parameter)

    def forward(self, gradients):
        return sum(
            (parameter.float() * gradients[name]).sum()
            for name, parameter in self.named_parameters()
        )


class Case(NamedTuple):
    world: int
    zero: int
    dtype: str = "fp32"
    rule: str = "adamw"
    offload: str = "none"

    def config(self):
        words = [
            "train.steps=5",
            f"parallel.zero={self.zero}",
            f"train.dtype={self.dtype}",
            f"optimizer.name={self.rule}",
            f"optimizer.grad_clip={CLIP}",
            f"optimizer.weight_decay={DECAY}",
            f"parallel.offload={self.offload}",
        ]
        return configuration.load(None, words)


class Outcome(NamedTuple):
    norms: list[float]
    applied: list[bool]
    weights: list[dict[str, torch.Tensor]]
    """The weights after each step."""
    updates: int
    pieces: list[tuple[str, int, dict[str, torch.Tensor]]]
    """This rank's fragments after the last step."""
    doubled: dict[str, torch.Tensor]
    """The weights after the masters were doubled in place."""


def gradients(step, microbatch, rank):
    """Returns gradients that are exact in bf16; those of even steps are not clipped."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * microbatch + rank)
    size = 0.25 if step % 2 == 0 else 4.0
    return {
        name: (torch.randn(shape, generator=generator) * size).bfloat16().float()
        for name, shape in SHAPES.items()
    }


def run_cases(rank, world_size, cases):
    from deepspeed.runtime.zero.partition_parameters import Init

    # DeepSpeed numbers parameters by process and compares the numbers between ranks.
    before, Init.param_id = Init.param_id, 0
    try:
        return [run_case(rank, case) for case in cases]
    finally:
        Init.param_id = before


def run_case(rank, case):
    mesh = make_mesh(rank, data=case.world)
    optimizer = ZeroOptimizer(
        Tiny(),
        settings=case.config().optimizer,
        parallel=case.config().parallel,
        dtype=DTYPES[case.dtype],
        mesh=mesh,
        microbatches=MICROBATCHES,
    )

    def backward(step):
        for microbatch in range(MICROBATCHES):
            given = gradients(step, microbatch, rank)
            if step == OVERFLOWS and rank == case.world - 1:
                given["matrix"][1, 2] = math.inf
            optimizer.backward(
                optimizer.module(given), torch.tensor(1.0), last=microbatch == MICROBATCHES - 1
            )

    def weights():
        return {
            name: optimizer.state.full_weights(parameter).float().clone()
            for name, parameter in optimizer.stage.named_parameters()
        }

    norms, applied, after = [], [], []
    for step, lr in enumerate(LRS):
        if step == DISCARDED:
            backward(99)
            optimizer.zero_grad()
        if step == len(LRS) - 1:
            optimizer.state.updates = 10
        backward(step)
        result = optimizer.step(lr)
        norms.append(result.grad_norm)
        applied.append(result.applied)
        after.append(weights())
    updates = optimizer.state.updates
    pieces = [
        (f.sharding.name, f.start, {name: t.clone() for name, t in f.tensors.items()})
        for f in optimizer.state.fragments()
    ]
    with torch.no_grad():
        for fragment in optimizer.state.fragments():
            fragment.tensors["master"].mul_(2.0)
    optimizer.state.copy_masters_to_weights()
    return Outcome(norms, applied, after, updates, pieces, weights())


def plain(case):
    """Returns norms, masters after each step and moments of plain torch in one process."""
    masters = {name: p.detach().clone().requires_grad_() for name, p in Tiny().named_parameters()}
    groups = [
        {"params": [masters[n] for n in ("embedding", "matrix")], "weight_decay": DECAY},
        {"params": [masters[n] for n in ("bias", "norm")], "weight_decay": 0.0},
    ]
    made = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
        "adam": lambda: torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-8),
        "lion": lambda: Lion(groups, lr=0.0, betas=(0.9, 0.95)),
    }
    optimizer = made[case.rule]()
    norms, after = [], []
    for step, lr in enumerate(LRS):
        given = [
            gradients(step, microbatch, rank)
            for rank in range(case.world)
            for microbatch in range(MICROBATCHES)
        ]
        for name, master in masters.items():
            master.grad = sum(part[name] for part in given) / case.world
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step == len(LRS) - 1 and case.rule.startswith("adam"):
            for state in optimizer.state.values():
                state["step"] = torch.tensor(10.0)
        if step != OVERFLOWS:
            optimizer.step()
        after.append({name: master.detach().clone() for name, master in masters.items()})
    states = {
        name: {key: optimizer.state[master][key] for key in STATES[case.rule]}
        for name, master in masters.items()
    }
    return norms, after, states


CASES = [
    *[
        Case(world, zero, dtype)
        for world in (1, 2)
        for zero in (0, 1, 2, 3)
        for dtype in ("fp32", "bf16")
    ],
    *[Case(2, zero, rule=rule) for zero in (1, 3) for rule in ("adam", "sgd", "lion")],
    Case(2, 1, offload="cpu"),
    Case(2, 2, offload="cpu"),
    Case(2, 1, "bf16", offload="cpu"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns the outcomes of all ranks by case."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for world in (1, 2):
        cases = [case for case in CASES if case.world == world]
        by_rank = run_ranks(run_cases, world, cases, folder=folder)
        found |= dict(zip(cases, zip(*by_rank, strict=True), strict=True))
    return found


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    return request.param


def test_norm_clipping_and_update_equal_plain_torch(outcomes, case):
    norms, after, _ = plain(case)
    for rank in outcomes[case]:
        for step, weights in enumerate(rank.weights):
            if step != OVERFLOWS:
                assert rank.norms[step] == pytest.approx(norms[step], rel=1e-5)
            for name, ours in weights.items():
                expected = after[step][name]
                expected = expected if case.dtype == "fp32" else expected.bfloat16().float()
                # Where torch's master lies between two bf16 numbers, an ulp of fp32 may decide.
                tolerance = (
                    {"rtol": 1e-5, "atol": 1e-6}
                    if case.dtype == "fp32"
                    else {"rtol": 2**-7, "atol": 1e-6}
                )
                torch.testing.assert_close(ours, expected, **tolerance)


def test_masters_and_states_are_fp32_and_equal_plain_torch(outcomes, case):
    """Exact in bf16 too, since gradients are summed in fp32."""
    _, after, states = plain(case)
    for rank in outcomes[case]:
        for name, start, tensors in rank.pieces:
            expected = {"master": after[-1][name], **states[name]}
            assert tensors.keys() == expected.keys()
            for key, ours in tensors.items():
                part = expected[key].flatten()[start : start + ours.numel()]
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours, part, rtol=1e-5, atol=1e-6)


def test_nonfinite_gradients_change_nothing(outcomes, case):
    for rank in outcomes[case]:
        assert rank.applied == [step != OVERFLOWS for step in range(len(LRS))]
        assert not math.isfinite(rank.norms[OVERFLOWS]) or rank.norms[OVERFLOWS] < 0
        for name, weights in rank.weights[OVERFLOWS].items():
            assert torch.equal(weights, rank.weights[OVERFLOWS - 1][name])


def test_updates_can_be_read_and_set(outcomes, case):
    """Set to 10 before the last step; the equality above shows that the bias correction follows."""
    assert [rank.updates for rank in outcomes[case]] == [
        11 if case.rule.startswith("adam") else 0
    ] * case.world


def test_fragments_cover_every_element_once(outcomes, case):
    """All ranks together cover them, or each rank without ZeRO."""
    ranks = [[rank] for rank in outcomes[case]] if case.zero == 0 else [outcomes[case]]
    for holders in ranks:
        covered = {name: torch.zeros(shape).flatten() for name, shape in SHAPES.items()}
        for rank in holders:
            for name, start, tensors in rank.pieces:
                covered[name][start : start + tensors["master"].numel()] += 1
        assert all((count == 1).all() for count in covered.values())
    if case.zero and case.world > 1:
        assert all(rank.pieces for rank in outcomes[case])


def test_masters_are_copied_to_weights(outcomes, case):
    for rank in outcomes[case]:
        for name, weights in rank.doubled.items():
            torch.testing.assert_close(weights, 2 * rank.weights[-1][name], rtol=1e-6, atol=0)


def test_lion_equals_algorithm_2_of_its_paper():
    """arXiv 2302.06675: c = b1 m + (1 - b1) g, w -= lr (sign(c) + d w), m = b2 m + (1 - b2) g."""
    lr, b1, b2, decay = 0.01, 0.9, 0.99, 0.2
    parameter = nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    w, m = parameter.detach().double(), torch.zeros(50, dtype=torch.float64)
    optimizer = Lion([parameter], lr=lr, betas=(b1, b2), weight_decay=decay)
    for step in range(20):
        gradient = torch.randn(50, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient
        optimizer.step()
        g = gradient.double()
        w = w - lr * ((b1 * m + (1 - b1) * g).sign() + decay * w)
        m = b2 * m + (1 - b2) * g
    torch.testing.assert_close(parameter.detach().double(), w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        optimizer.state[parameter]["exp_avg"].double(), m, rtol=1e-5, atol=1e-6
    )
