"""LoRA, rsLoRA and DoRA on each layout equal peft on transformers with plain torch AdamW."""

from __future__ import annotations

import pytest
import torch
from helpers.lora_runs import PP, TP, TP_PP, layout, reference, row, run_layout
from helpers.rank_pool import run_ranks
from helpers.reference_model import assert_equal

ROWS = [
    row(),
    row(kind="rslora"),
    row("gpt2"),
    row("gpt2", "dora"),
    # one axis
    row("gpt2", "lora", 2, **TP),
    row("llama", "dora", 2, **TP),
    row("gpt2", "rslora", 2, **PP),
    row(world=2, zero=0),
    row(kind="dora", world=2, zero=2),
    row(kind="dora", world=2, zero=3),
    *[
        row("tied", "dora", 2, schedule=name, **PP)
        for name in ("interleaved", "zb-h1", "zb-v", "dualpipev")
    ],
    # two and three axes
    row(world=4, **TP_PP),
    row("gpt2", "dora", 4, **TP_PP),
    *[row(model, "dora", 2, **TP) for model in ("neox", "phi3")],
    row("gpt2", "dora", 4, zero=3, **TP),
    row("gpt2", "dora", 4, zero=2, sequence=True, **TP),
    row("tied", "dora", 4, tensor=4, sequence=True),
    row("gpt2", "dora", 4, sequence=True, schedule="zb-v", recompute="full", **TP_PP),
    row("tied", "lora", 4, recompute="selective", schedule="zb-h1", **PP),
    row("llama", "dora", 8, **TP_PP),
    # stages, and whole ranks, without an adapter
    row("llama", "last", 2, schedule="zb-h1", **PP),
    row("tied", "last", 4, **PP),
    row("llama", "last", 4, pipeline=4, zero=0),
    row("llama", "last", 2, schedule="zb-v", **PP),
    row("llama", "last-dora", 2, **PP),
]


@pytest.mark.parametrize(("model", "kind", "world", "settings"), ROWS)
def test_equals_peft(model, kind, world, settings, tmp_path):
    results = run_ranks(run_layout, world, layout(model, kind, settings), folder=tmp_path)
    assert_equal(results, reference(model, kind), losses=2e-6)


@pytest.mark.parametrize(
    ("model", "kind", "world", "settings"),
    [
        row("llama", "dora", 4, sequence=True, **TP_PP),
        row("llama", "last", 4, pipeline=4),
        row("gpt2", "dora", 2, zero=3),
    ],
)
def test_bf16_is_close_to_fp32(model, kind, world, settings, tmp_path):
    """Allows only for the rounding of weights and activations to 8 bits."""
    results = run_ranks(
        run_layout, world, layout(model, kind, settings, **{"train.dtype": "bf16"}), folder=tmp_path
    )
    assert_equal(results, reference(model, kind), losses=1e-3, norms=3e-2, gradient=0.1)


def test_dropout_of_replicated_inputs_is_the_same_on_every_layout(tmp_path):
    """Masks are equal on tensor ranks that hold copies, and when a block is recomputed."""
    one, _, _ = run_ranks(run_layout, 1, layout("llama", "dropped", {}), folder=tmp_path)[0]
    none, _, _ = run_ranks(
        run_layout, 1, layout("llama", "dropped", {}, **{"lora.dropout": 0.0}), folder=tmp_path
    )[0]
    assert one != none
    split, _, _ = run_ranks(
        run_layout,
        4,
        layout("llama", "dropped", {"recompute": "full", "schedule": "zb-h1", **TP_PP}),
        folder=tmp_path,
    )[0]
    torch.testing.assert_close(torch.tensor(split), torch.tensor(one), rtol=2e-6, atol=0)
