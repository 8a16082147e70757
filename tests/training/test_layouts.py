"""Losses, gradients and norms on each layout equal transformers with plain torch AdamW."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers.layout_runs import MODELS, PLAIN, layout, make_config, reference, run_layout, tokens
from helpers.rank_pool import run_ranks
from helpers.reference_model import Trained, assert_equal
from helpers.training_runs import microbatches

from megatrain.distributed.mesh import make_mesh
from megatrain.models.config import load_hf_config, read_config


def row(model="llama", world=1, **settings):
    name = "-".join([model, f"w{world}", *(f"{k}{v}" for k, v in settings.items())])
    return pytest.param(model, world, settings, id=name)


SPLIT = ("interleaved", "zb-h1", "zb-v", "dualpipev")
TP, PP, TP_PP = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}
ROWS = [
    # one rank: our model against each family's in transformers
    *[row(model) for model in PLAIN],
    row(recompute="full"),
    row(recompute="selective"),
    row(micro_batch_size=1),
    row(zero=0),
    row(offload="cpu"),
    # one axis
    row(world=2, **TP),
    row(world=4, tensor=4),
    row(world=2, sequence=True, **TP),
    row(world=4, tensor=4, sequence=True),
    row(world=2, **PP),
    row(world=2, schedule="gpipe", **PP),
    row(world=4, pipeline=4),
    row(world=4, pipeline=4, schedule="gpipe"),
    *[row(world=2, zero=stage) for stage in (0, 1, 2, 3)],
    row(world=4, zero=1),
    row(world=2, zero=1, offload="cpu"),
    row(world=2, zero=2, offload="cpu"),
    # two axes
    *[row(model, 4, **TP_PP) for model in PLAIN],
    *[row(model, 4, sequence=True, **TP_PP) for model in PLAIN],
    row(world=4, schedule="gpipe", **TP_PP),
    row(world=4, recompute="full", **TP_PP),
    row(world=4, recompute="selective", sequence=True, **TP_PP),
    *[row(world=4, zero=stage, **TP) for stage in (0, 1, 2, 3)],
    row(world=4, zero=1, sequence=True, **TP),
    *[row(world=4, zero=stage, **PP) for stage in (0, 1)],
    row(world=4, schedule="gpipe", **PP),
    # key and value heads held by two ranks each; one tied matrix at both ends of the pipeline
    row("qwen3", 4, tensor=4, sequence=True),
    row("gpt2", 4, tensor=4),
    row("tied", 2, **PP),
    row("tied", 4, pipeline=4),
    row("tied", 4, zero=0, **PP),
    row("tied", 4, zero=1, **PP),
    row("tied", 4, zero=2, **TP),
    row("tied", 4, zero=3, **TP),
    row("gpt2", 4, zero=3, sequence=True, **TP),
    # every schedule; one tied matrix on one rank of a V
    *[row(world=2, schedule=name, **PP) for name in SPLIT],
    *[row("tied", 2, schedule=name, **PP) for name in SPLIT],
    *[row("tied", 4, schedule=name, pipeline=4) for name in ("zb-h1",)],
    *[row("deep", 4, schedule=name, pipeline=4, micro_batch_size=1) for name in SPLIT],
    *[row(world=4, schedule=name, **TP_PP) for name in SPLIT],
    row("gpt2", 4, schedule="zb-v", sequence=True, recompute="full", **TP_PP),
    row("deep", 2, schedule="interleaved", virtual=4, **PP),
    row("deep", 3, schedule="interleaved", pipeline=3, micro_batch_size=1),
    *[
        row("tied", 4, schedule=name, zero=1, recompute="selective", **PP)
        for name in ("interleaved", "zb-h1", "zb-v")
    ],
    # families with other switches: norms after branches and over all heads, fused tensors
    row("gemma2", 4, sequence=True, **TP_PP),
    row("gemma2", 4, tensor=4),
    row("gemma3_text", 2, **PP),
    row("gemma3_text", 4, tensor=4, sequence=True),
    row("phi3", 4, sequence=True, **TP_PP),
    row("phi3", 4, tensor=4),
    row("olmo2", 4, recompute="selective", **TP_PP),
    row("olmo2", 4, tensor=4, sequence=True),
    row("olmo2", 4, zero=3, **TP),
    row("gpt_neox", 2, sequence=True, **TP),
    row("gpt_neox", 4, schedule="zb-v", **TP_PP),
    row("gpt_neox", 4, zero=2, **TP),
    row("starcoder2", 2, **TP),
    row("starcoder2", 4, sequence=True, recompute="full", **TP_PP),
    # split backwards and several chunks with recomputation, tied weights and replicas together
    *[row("tied", 4, schedule=name, recompute="full", **TP_PP) for name in SPLIT],
    row("tied", 2, schedule="gpipe", recompute="selective", **PP),
    *[row(world=4, schedule=name, recompute="full", micro_batch_size=1, **PP) for name in SPLIT],
    # whatever auto measures to be fastest
    row(world=2, schedule="auto", **PP),
    row("tied", 4, schedule="auto", pipeline=4),
    row("tied", 4, schedule="auto", **TP_PP),
    # compiled kernels
    row("qwen3", 4, compile=True, schedule="zb-v", sequence=True, recompute="full", **TP_PP),
    # three axes
    row(world=8, **TP_PP),
    row("tied", 8, sequence=True, **TP_PP),
    row("gpt2", 8, pipeline=4, zero=0),
    row("deep", 8, schedule="zb-v", tensor=2, pipeline=4),
]
BF16_ROWS = [
    row(),
    row("gpt2"),
    row(world=2, **TP),
    row(world=2, **PP),
    *[row(world=2, zero=stage) for stage in (0, 1, 2, 3)],
    row(world=4, sequence=True, **TP_PP),
    row("tied", 4, **TP_PP),
    row("tied", 4, **PP),
    row(world=4, zero=2, **TP),
    *[row(world=2, schedule=name, **PP) for name in ("auto", *SPLIT)],
    row("tied", 4, schedule="zb-v", **TP_PP),
    *[
        row("tied", 4, schedule=name, recompute="full", micro_batch_size=1, **PP)
        for name in ("interleaved", "zb-h1", "dualpipev")
    ],
    *[
        row("tied", 4, schedule=name, recompute="selective", **TP_PP)
        for name in ("interleaved", "zb-h1", "dualpipev")
    ],
    row(world=4, compile=True, sequence=True, **TP_PP),
]


@pytest.mark.parametrize(("model", "world", "settings"), ROWS)
def test_equals_plain_torch(model, world, settings, tmp_path):
    results = run_ranks(
        run_layout,
        world,
        layout(model, settings, **{"run.output_dir": str(tmp_path)}),
        folder=tmp_path,
    )
    assert_equal(results, reference(model), losses=2e-6)


@pytest.mark.parametrize(("model", "world", "settings"), BF16_ROWS)
def test_bf16_is_close_to_fp32(model, world, settings, tmp_path):
    """Allows only for the rounding of weights and activations to 8 bits."""
    results = run_ranks(
        run_layout,
        world,
        layout(model, settings, **{"train.dtype": "bf16", "run.output_dir": str(tmp_path)}),
        folder=tmp_path,
    )
    assert_equal(results, reference(model), losses=2e-4, norms=1e-2, gradient=2e-2)


DROPPING_ROWS = [
    row("dropping", 2, **PP),
    row("dropping", 2, zero=3),
    row("dropping", 4, zero=1, recompute="full", **PP),
    row("dropping", 2, schedule="zb-v", recompute="selective", **PP),
    row("dropping copies", 2, **TP),
    row("dropping copies", 4, recompute="full", schedule="interleaved", **TP_PP),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Trains on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    return cache(
        lambda model: run_ranks(
            run_layout, 1, layout(model, {}, **{"run.output_dir": str(folder)}), folder=folder
        )[0]
    )


@pytest.mark.parametrize(("model", "world", "settings"), DROPPING_ROWS)
def test_dropout_equals_that_of_one_process(model, world, settings, alone, tmp_path):
    """Compares layouts on which each rank drops complete tensors.

    Masks of the heads or tokens of a tensor rank are its own.
    """
    results = run_ranks(
        run_layout,
        world,
        layout(model, settings, **{"run.output_dir": str(tmp_path)}),
        folder=tmp_path,
    )
    assert abs(alone(model).losses[0] / reference("gpt2").losses[0] - 1) > 1e-4, (
        "something is dropped"
    )
    assert_equal(
        [ran._replace(pieces=[]) for ran in results],
        Trained(alone(model).losses, alone(model).norms, {}),
        losses=2e-6,
    )


def run_tied(rank, world_size, rows):
    """Trains three steps per row; returns group sizes and local shards of the tied matrix."""
    from megatrain.training.step_runner import StepRunner

    found = []
    for config in rows:
        mesh = make_mesh(rank, pipeline=config.parallel.pipeline, data=config.data_size(world_size))
        runner = StepRunner(
            config, read_config(load_hf_config(config.model)), mesh, torch.device("cpu")
        )
        for step in range(1, 4):
            runner.train_step(step, microbatches(tokens(step), 1, mesh.data))
        share = sum(
            flat.numel() for flat in runner.optimizer.optimizer.optimizer.param_groups[0]["params"]
        )
        found.append(
            (
                share,
                [
                    (f.start, f.tensors["master"].clone())
                    for f in runner.optimizer.state.fragments()
                    if f.sharding.kind == "embedding"
                ],
            )
        )
    return found


def test_tied_matrix_is_bit_identical_on_both_ends(tmp_path):
    """Each end updates its copy, and a checkpoint holds one, so they must not diverge.

    Four replicas, which are summed in an order that depends on the place in a message, and groups
    that do not fill whole registers.
    """
    odd = {
        **MODELS["tied"],
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    rows = []
    for more in (
        {},
        {"parallel.zero": 0},
        {"train.dtype": "bf16"},
        {"optimizer.name": "sgd"},
        {"parallel.offload": "cpu"},
    ):
        settings = {
            "parallel.pipeline": 2,
            "train.micro_batch_size": 1,
            "optimizer.lr": 0.01,
            "optimizer.grad_clip": 0.0,
            **more,
        }
        rows.append(replace(make_config("tied", **settings), model=odd))
    results = run_ranks(run_tied, 8, rows, folder=tmp_path)
    for number, config in enumerate(rows):
        ends = []
        for stage in (results[:4], results[4:]):
            ends.append(torch.full((67 * 20,), float("nan")))
            for share, pieces in (of_rank[number] for of_rank in stage):
                assert share % 16 == 0
                for start, master in pieces:
                    ends[-1][start : start + master.numel()] = master
        assert ends[0].equal(ends[1]), (config.parallel, config.train.dtype, config.optimizer.name)
