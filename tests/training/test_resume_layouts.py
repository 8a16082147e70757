"""A run resumes on any layout with the losses of one process that was never interrupted."""

from __future__ import annotations

import pytest
from helpers.rank_pool import run_ranks
from helpers.training_runs import lines, pretrain, write_tokens

HALF, STEPS = 3, 6
SIZES = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    **SIZES,
}
MODELS = {
    "llama": LLAMA,
    "untied": {**LLAMA, "tie_word_embeddings": False},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **SIZES,
    },
}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2, "sequence": True}),
    "tp4": (4, {"tensor": 4}),
    "pp2": (2, {"pipeline": 2}),
    "zb-v": (2, {"pipeline": 2, "schedule": "zb-v"}),
    "cut": (2, {"pipeline": 2, "schedule": "gpipe", "layers_per_stage": [1, 3]}),
    "tp2pp2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "interleaved-dp2": (4, {"pipeline": 2, "schedule": "interleaved"}),
    "dp2-zero0": (2, {"zero": 0}),
    "dp4-zero1": (4, {"zero": 1}),
    "dp2-zero2-offload": (2, {"zero": 2, "offload": "cpu"}),
    "dp2-zero3": (2, {"zero": 3}),
    "tp2dp2-zero3": (4, {"tensor": 2, "zero": 3}),
}
PAIRS = [
    ("llama", "one", "tp2pp2"),
    ("llama", "one", "dp2-zero3"),
    ("llama", "tp2pp2", "one"),
    ("llama", "tp2pp2", "dp4-zero1"),
    ("llama", "tp2pp2", "zb-v"),
    ("llama", "zb-v", "interleaved-dp2"),
    ("llama", "zb-v", "cut"),
    ("llama", "interleaved-dp2", "tp4"),
    ("llama", "tp4", "tp2"),
    ("llama", "tp4", "dp2-zero2-offload"),
    ("llama", "dp2-zero3", "tp4"),
    ("llama", "dp2-zero3", "pp2"),
    ("untied", "dp2-zero0", "dp4-zero1"),
    ("untied", "dp2-zero0", "zb-v"),
    ("untied", "dp2-zero2-offload", "tp2pp2"),
    ("gpt2", "tp2dp2-zero3", "one"),
    ("gpt2", "tp2dp2-zero3", "tp2pp2"),
    ("gpt2", "pp2", "tp2dp2-zero3"),
    ("gpt2", "pp2", "dp2-zero0"),
]


class Runs:
    """Runs that tests share."""

    def __init__(self, folder):
        self.folder, self.done = folder, {}
        write_tokens(folder / "tokens")

    def __call__(self, model, layout, *, start=None, until=STEPS, **train):
        """Returns the folder of a run of a model on a layout, from a checkpoint if given."""
        key = (model, layout, start, until, *train.items())
        if key not in self.done:
            self.done[key] = self.folder / f"run{len(self.done)}"
            world, parallel = LAYOUTS[layout]
            train = {
                "steps": STEPS,
                "exit_after_step": until,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                **train,
            }
            raw = {
                "run": {"output_dir": str(self.done[key])},
                "model": MODELS[model],
                "train": train,
                "checkpoint": {"resume": str(start or "never")},
                "parallel": parallel,
                "data": {"train": str(self.folder / "tokens"), "sequence_length": 16},
                "optimizer": {"lr": 1e-3, "grad_clip": 0.5},
                "lr_schedule": {"name": "constant"},
            }
            run_ranks(pretrain, world, raw, folder=self.folder)
        return self.done[key]


def losses(run):
    return {line["step"]: line["loss"] for line in lines(run)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("reshard"))


def half(runs, model, layout, **train):
    return runs(model, layout, until=HALF, **train) / "checkpoints" / f"step-{HALF:08d}"


@pytest.mark.parametrize(
    ("model", "before", "after"), PAIRS, ids=["-to-".join(pair) for pair in PAIRS]
)
def test_losses_equal_those_of_one_uninterrupted_process(model, before, after, runs):
    whole = losses(runs(model, "one"))
    parts = losses(runs(model, after, start=half(runs, model, before)))
    assert list(parts) == list(range(HALF + 1, STEPS + 1))
    assert [parts[step] for step in parts] == pytest.approx(
        [whole[step] for step in parts], rel=2e-6, abs=0
    )


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [
        ("fp32", "tp2pp2", "dp2-zero3"),
        ("bf16", "tp2dp2-zero3", "zb-v"),
        ("bf16", "zb-v", "dp4-zero1"),
    ],
)
def test_resume_into_bf16(dtype, before, after, runs):
    """Resumes from fp32, and from bf16 on another layout; only 8-bit rounding differs."""
    whole = losses(runs("llama", "one"))
    parts = losses(
        runs("llama", after, start=half(runs, "llama", before, dtype=dtype), dtype="bf16")
    )
    assert list(parts) == list(range(HALF + 1, STEPS + 1))
    assert [parts[step] for step in parts] == pytest.approx(
        [whole[step] for step in parts], rel=2e-4, abs=0
    )


def test_weights_of_another_dtype_are_rounded_master_weights(runs):
    from safetensors.torch import load_file

    before = half(runs, "llama", "tp2pp2")
    after = (
        runs("llama", "zb-v", start=before, until=HALF + 1, dtype="bf16")
        / "checkpoints"
        / f"step-{HALF + 1:08d}"
    )
    weights = {
        name: tensor
        for path in after.glob("model*.safetensors")
        for name, tensor in load_file(path).items()
    }
    old = {
        name: tensor
        for path in before.glob("model*.safetensors")
        for name, tensor in load_file(path).items()
    }
    masters = {
        name: tensor
        for path in (after / "optimizer").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert set(weights) == set(old)
    for name, tensor in weights.items():
        (master,) = [
            masters[key]
            for key in masters
            if key.startswith(f"{name}[") and key.endswith("/master")
        ]
        assert tensor.dtype.itemsize == 2
        assert tensor.flatten().equal(master.to(tensor.dtype))
        assert (master.view_as(old[name]) - old[name]).abs().max() < 3e-3, (
            "one step of 1e-3 from what fp32 had"
        )
