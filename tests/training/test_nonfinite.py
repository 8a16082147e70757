"""Non-finite numbers on one rank: all ranks skip the step, name the cause and continue."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from helpers.rank_pool import run_ranks
from helpers.training_runs import lines, microbatches, place, write_tokens

from megatrain.checkpoint.train_state import read_train_state
from megatrain.config import loader as configuration
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import shard_spec
from megatrain.models.config import load_hf_config, read_config
from megatrain.optim.loss_scale import LossScale

STEPS, BAD, BATCH, LENGTH = 4, 2, 8, 8
MODEL = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NORM, MLP = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"


class Case(NamedTuple):
    """A layout, and what is made non-finite on which rank in step BAD.

    `what` is a parameter, for its gradient, or `loss`.
    """

    layout: dict[str, int | bool]
    rank: int
    what: str
    dtype: str = "fp32"

    @property
    def world(self) -> int:
        return math.prod(int(self.layout.get(axis, 1)) for axis in ("tensor", "pipeline", "data"))


CASES = [
    # A replicated norm, which does not count in the gradient's norm: only the flag shows it.
    Case({"tensor": 2, "pipeline": 2}, 3, NORM),
    Case({"tensor": 2, "pipeline": 2}, 3, NORM, "bf16"),
    Case({"tensor": 2, "data": 2, "zero": 3}, 3, NORM),
    Case({"tensor": 2, "pipeline": 2, "sequence": True}, 2, NORM),
    Case({"tensor": 2, "pipeline": 2}, 1, "model.layers.0.mlp.up_proj.weight"),
    Case({"pipeline": 2, "data": 2}, 3, "loss"),
    Case({"tensor": 2, "pipeline": 2}, 3, "loss"),
    *[Case({"data": 2, "zero": zero}, 1, MLP) for zero in (0, 1, 2, 3)],
    Case({"data": 2, "zero": 1}, 1, MLP, "bf16"),
    Case({"data": 2, "zero": 2}, 1, "loss"),
]
ALONE = [Case({}, 0, MLP), Case({}, 0, MLP, "bf16"), Case({}, 0, "weight")]


class Outcome(NamedTuple):
    losses: list[float]
    applied: list[bool]
    why: str
    pieces: list[tuple]
    """Of masters and moments after the last step: declaration, shape, start, tensors by name."""
    culprit: str


class Scaled(NamedTuple):
    """The outcome of a run in fp16: norms, steps, loss scales, and the state for a resume."""

    norms: list[float]
    applied: list[bool]
    rescaled: list[bool]
    scales: list[float]
    state: LossScale


def batches(step, config, mesh):
    tokens = torch.randint(
        0, 67, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step)
    )
    return microbatches(tokens, config.train.micro_batch_size, mesh.data)


def spoil(runner, what):
    """Makes the loss or a gradient of this rank non-finite; returns a function that ends this."""
    if what == "loss":
        return (
            runner.stage.layers[-1]
            .register_forward_hook(lambda module, inputs, output: output * math.nan)
            .remove
        )
    parameter = next(p for p in runner.stage.parameters() if shard_spec(p).name == what)
    if runner.optimizer.partitions_gradients:
        handle = parameter.register_hook(lambda grad: torch.full_like(grad, math.nan))
        hooks = dict(parameter._backward_hooks)
        parameter._backward_hooks.clear()
        parameter._backward_hooks.update(
            {handle.id: hooks.pop(handle.id), **hooks}
        )  # before the hooks of ours
        return handle.remove
    backward = runner.optimizer.backward

    def spoiled(*args, **more):
        backward(*args, **more)
        parameter.main_grad.view(-1)[3] = math.nan

    runner.optimizer.backward = spoiled
    return lambda: setattr(runner.optimizer, "backward", backward)


def train(rank, world_size, cases):
    return [train_case(rank, world_size, case) for case in cases]


def make_runner(rank, world_size, case):
    from megatrain.training.step_runner import StepRunner

    raw = {
        "model": MODEL,
        "parallel": dict(case.layout),
        "data": {"sequence_length": LENGTH},
        "train": {
            "steps": STEPS,
            "global_batch_size": BATCH,
            "micro_batch_size": 2,
            "dtype": case.dtype,
        },
        "optimizer": {"lr": 1e-2},
        "lr_schedule": {"name": "constant"},
    }
    config = configuration.from_dict(raw)
    configuration.check(config)
    mesh = make_mesh(
        rank,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        data=config.data_size(world_size),
    )
    return StepRunner(config, read_config(load_hf_config(config.model)), mesh, torch.device("cpu"))


def train_case(rank, world_size, case):
    runner = make_runner(rank, world_size, case)
    config, mesh = runner.config, runner.mesh
    losses, applied, why, culprit = [], [], "", ""
    for step in range(1, STEPS + 1):
        restore = (
            spoil(runner, case.what)
            if step == BAD and rank == case.rank and case.what != "weight"
            else lambda: None
        )
        report = runner.train_step(step, batches(step, config, mesh))
        restore()
        losses.append(report.loss)
        applied.append(report.applied)
        why = why or report.reason

    def shape_of(parameter):
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    pieces = [
        (
            replace(f.sharding, grad_reduce_axes=(), is_owner=True),
            shape_of(f.parameter),
            f.start,
            {name: t.clone() for name, t in f.tensors.items()},
        )
        for f in runner.optimizer.state.fragments()
    ]
    if case.what == "weight":
        with torch.no_grad():
            next(p for p in runner.stage.parameters() if shard_spec(p).name == NORM)[5] = math.inf
        why = runner.train_step(STEPS, batches(STEPS, config, mesh)).reason
        culprit = runner.locate_nonfinite()
    return Outcome(losses, applied, why, pieces, culprit)


def scale(rank, world_size, layouts):
    return [
        scale_case(rank, world_size, Case(layout, 0, "model.layers.0.mlp.up_proj.weight", "fp16"))
        for layout in layouts
    ]


def scale_case(rank, world_size, case):
    """Lets gradients overflow fp16 in the first step, and at any scale from the third on."""
    runner = make_runner(rank, world_size, case)
    reports, scales = [], []
    runner.optimizer.loss_scaling = LossScale(2.0**30, 1, -1, 0)
    for step in range(1, 7):
        if step == 2:
            runner.optimizer.loss_scaling = LossScale(2.0**4, 1, -1, 7)
        if step == 3:
            runner.optimizer.loss_scaling = LossScale(2.0, 1, -1, 8)
        restore = spoil(runner, case.what) if step >= 3 and rank == 0 else lambda: None
        reports.append(runner.train_step(step, batches(step, runner.config, runner.mesh)))
        restore()
        scales.append(runner.optimizer.loss_scaling.scale)
    return Scaled(
        [r.grad_norm for r in reports],
        [r.applied for r in reports],
        [r.rescaled for r in reports],
        scales,
        runner.optimizer.loss_scaling,
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns the outcomes of all ranks, by case."""
    folder, found = tmp_path_factory.mktemp("ranks"), []
    for world in (1, 2, 4):
        cases = [case for case in [*ALONE, *CASES] if case.world == world]
        by_rank = run_ranks(train, world, cases, folder=folder)
        found += zip(cases, zip(*by_rank, strict=True), strict=True)
    return lambda wanted: next(outcome for case, outcome in found if case == wanted)


def whole(outcomes):
    """Assembles master weights and moments of the model from all ranks."""
    found: dict = {}
    for spec, shape, start, tensors in (piece for outcome in outcomes for piece in outcome.pieces):
        for state, tensor in tensors.items():
            flat = found.setdefault(
                (spec, shape, state), torch.full((torch.Size(shape).numel(),), math.nan)
            )
            flat[start : start + tensor.numel()] = tensor
    tensors: dict = {}
    for (spec, shape, state), flat in found.items():
        tensor = tensors.setdefault(f"{spec.name} {state}", torch.full(spec.shape, math.nan))
        spec.unshard_into(spec.local_view(flat.view(shape)), tensor)
    return tensors


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: "-".join(
        [*(f"{k}{v}" for k, v in case.layout.items()), case.dtype, case.what]
    ),
)
def test_nonfinite_number_on_one_rank_skips_the_step_on_all(case, outcomes):
    ranks = outcomes(case)
    assert all(
        outcome.applied == [step != BAD for step in range(1, STEPS + 1)] for outcome in ranks
    )
    assert len({tuple(repr(loss) for loss in outcome.losses) for outcome in ranks}) == 1, (
        "the same on all ranks to the last bit"
    )
    (alone,) = outcomes(Case({}, 0, MLP, case.dtype))
    tolerance = 2e-5 if case.dtype == "fp32" else 2e-2
    for step, (ours, expected) in enumerate(
        zip(ranks[0].losses, alone.losses, strict=True), start=1
    ):
        assert ours == pytest.approx(expected, rel=tolerance) or (
            step == BAD and math.isnan(ours) and case.what == "loss"
        )
    tensors, expected = whole(ranks), whole([alone])
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        difference = (tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        if case.dtype == "fp32" or name.endswith("master"):
            assert difference < (1e-4 if case.dtype == "fp32" else 0.2), name
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: "-".join(
        [*(f"{k}{v}" for k, v in case.layout.items()), case.dtype, case.what]
    ),
)
def test_nonfinite_number_is_named_with_its_rank(case, outcomes):
    ranks = outcomes(case)
    assert len({outcome.why for outcome in ranks}) == 1
    what = "loss" if case.what == "loss" else f"gradient of {case.what}"
    assert ranks[0].why == f"non-finite {what} on rank {case.rank}"


def test_nonfinite_weight_is_named(outcomes):
    (outcome,) = outcomes(Case({}, 0, "weight"))
    assert outcome.why == f"non-finite loss on rank 0: the weight {NORM} is not finite on rank 0"
    assert outcome.culprit == f"the weight {NORM} is not finite on rank 0"


LAYOUTS = [{"data": 2, "zero": zero} for zero in (0, 1, 2, 3)] + [{"pipeline": 2}]


def test_fp16_overflow_lowers_the_loss_scale_to_its_minimum(tmp_path):
    """The scale falls if gradients overflow, and is the same on all ranks."""
    by_rank = run_ranks(scale, 2, LAYOUTS, folder=tmp_path)
    for layout, ranks in zip(LAYOUTS, zip(*by_rank, strict=True), strict=True):
        assert len({(tuple(rank.applied), tuple(rank.scales)) for rank in ranks}) == 1, layout
        run = ranks[0]
        assert run.applied == [False, True, False, False, False, False], layout
        assert run.rescaled == [True, False, True, False, False, False], layout
        assert run.scales == [2.0**29, 2.0**4, 1.0, 1.0, 1.0, 1.0], layout
        assert run.norms[1] == pytest.approx(by_rank[0][0].norms[1], rel=1e-2), layout
        assert run.state.last_overflow == 11


def train_in_fp16(rank, world_size, raws):
    """Trains in fp16, which the checks refuse on CPUs."""
    from megatrain.training.run import pretrain

    patch = pytest.MonkeyPatch()
    patch.setattr("megatrain.training.trainer.check_start", lambda *args: None)
    try:
        for raw in raws:
            pretrain(configuration.from_dict(raw), place(rank, world_size))
    finally:
        patch.undo()


def test_resume_keeps_the_loss_scale(tmp_path):
    write_tokens(tmp_path / "tokens", documents=20)

    def raw(run, **train):
        return {
            "run": {"output_dir": str(tmp_path / run)},
            "model": MODEL,
            "data": {"train": str(tmp_path / "tokens"), "sequence_length": LENGTH},
            "train": {
                "steps": 4,
                "global_batch_size": BATCH,
                "micro_batch_size": 4,
                "dtype": "fp16",
                **train,
            },
        }

    run_ranks(
        train_in_fp16,
        1,
        [raw("parts", exit_after_step=2), raw("parts"), raw("whole")],
        folder=tmp_path,
    )
    states = [
        read_train_state(tmp_path / run / "checkpoints" / "step-00000004").state.loss_scaling
        for run in ("parts", "whole")
    ]
    assert states == [LossScale(65536.0, 2, -1, 4)] * 2, "all four steps are counted"
    losses = [[line["loss"] for line in lines(tmp_path / run)] for run in ("parts", "whole")]
    assert losses[0] == losses[1]
