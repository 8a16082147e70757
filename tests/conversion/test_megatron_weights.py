"""Megatron-LM's checkpoints of all layouts and names become the original transformers models."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers.megatron_layout import write_megatron
from helpers.tiny_folders import GPT2, LLAMA, convert, make_folder, tensors_of

from megatrain.conversion import megatron_weights

FOUR = {**LLAMA, "num_hidden_layers": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = {
    "llama-tp1": (LLAMA, {}),
    "llama-tp2-pp2-te": (LLAMA, {"tensor": 2, "pipeline": 2}),
    "llama-tp2-pp2-core": (LLAMA, {"tensor": 2, "pipeline": 2, "names": "core"}),
    "llama-tp2-pp2-legacy": (LLAMA, {"tensor": 2, "pipeline": 2, "names": "legacy"}),
    "llama-tied-padded-tp2-pp2": (
        {**LLAMA, "tie_word_embeddings": True},
        {"tensor": 2, "pipeline": 2, "padded": 72},
    ),
    "llama-tied-legacy-pp2": (
        {**LLAMA, "tie_word_embeddings": True},
        {"pipeline": 2, "names": "legacy"},
    ),
    "llama-virtual-pp2": (FOUR, {"tensor": 2, "pipeline": 2, "virtual": 2, "padded": 68}),
    "llama-heads-alike-tp4": ({**LLAMA, "num_key_value_heads": 4}, {"tensor": 4, "padded": 128}),
    "llama-biases-wide-heads": (
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
        {"tensor": 2, "padded": 68},
    ),
    "llama3-rope": (
        {**LLAMA, "rope_parameters": LLAMA3, "head_dim": 16, "hidden_size": 64},
        {"use_rope_scaling": True, "rope_scaling_factor": 8.0},
    ),
    "llama-linear-rope": (
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
        {"rotary_seq_len_interpolation_factor": 2},
    ),
    "qwen2-tp2": ({**LLAMA, "model_type": "qwen2"}, {"tensor": 2, "padded": 68}),
    "qwen3-tp2-pp2": (
        {**LLAMA, "model_type": "qwen3", "head_dim": 16},
        {"tensor": 2, "pipeline": 2, "padded": 68},
    ),
    "gpt2-tp1": (GPT2, {}),
    "gpt2-tp2-pp2-te": (GPT2, {"tensor": 2, "pipeline": 2, "padded": 72}),
    "gpt2-tp4-legacy": (GPT2, {"tensor": 4, "names": "legacy", "padded": 68}),
    "gpt2-pp2-legacy-erf": (
        {**GPT2, "activation_function": "gelu"},
        {"pipeline": 2, "names": "legacy"},
    ),
    "gpt2-untied-core-tp2": (
        {**GPT2, "tie_word_embeddings": False},
        {"tensor": 2, "names": "core", "padded": 68},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_conversion_restores_the_original_model(case, tmp_path, capfd):
    fields, layout = CASES[case]
    model = make_folder(tmp_path / "hf", fields)
    write_megatron(tmp_path / "run" / "iter_0000007", model, **layout)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    assert convert(tmp_path / "run", tmp_path / "out", "--vocab-size", "67") == 0, (
        capfd.readouterr().err
    )
    output = capfd.readouterr().out
    tensor, pipeline = layout.get("tensor", 1), layout.get("pipeline", 1)
    assert (
        f"Megatron-LM checkpoint, tensor {tensor} x pipeline {pipeline} ranks "
        f"({fields['model_type']})" in output
    )
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "hf")
    figures = json.loads((tmp_path / "out" / "conversion.json").read_text())["proof"]
    assert figures["source_computed_by"] == "a decoder on Megatron-LM's tensors"
    assert figures["max_logit_difference"] <= 1e-5
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits,
            model(tokens).logits,
        )


@pytest.fixture
def written(tmp_path):
    """A Llama at tensor 2 x pipeline 2, and the model itself."""
    model = make_folder(tmp_path / "hf", LLAMA)
    write_megatron(tmp_path / "run", model, tensor=2, pipeline=2)
    return tmp_path / "run"


def test_lower_dtype_and_padding(tmp_path, capfd):
    model = make_folder(tmp_path / "hf", LLAMA)
    write_megatron(tmp_path / "run", model, tensor=2, padded=72)
    assert convert(tmp_path / "run", tmp_path / "out", "--dtype", "bf16") == 0
    assert (
        "keeping all 72 rows of the embedding, including Megatron-LM's padding"
        in capfd.readouterr().out
    )
    found = tensors_of(tmp_path / "out")
    assert found["lm_head.weight"][1] == (72, 32)
    assert {dtype for dtype, _, _ in found.values()} == {torch.bfloat16}


def test_checkpoint_without_args_requires_a_config(tmp_path, capfd):
    model = make_folder(tmp_path / "hf", {**LLAMA, "model_type": "mistral"})
    write_megatron(tmp_path / "run", model, tensor=2, padded=72, args=False)
    assert convert(tmp_path / "run", tmp_path / "out") == 1
    assert (
        "has no args, which describe the model; name its Hugging Face config with --config"
        in capfd.readouterr().err
    )
    assert convert(tmp_path / "run", tmp_path / "out", "--config", tmp_path / "hf") == 0
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "hf")


@pytest.mark.parametrize("broken", ["query", "gate", "transposed heads"])
def test_wrong_split_fails_the_verification(broken, written, tmp_path, capfd, monkeypatch):
    """Tensors of the right names and shapes, from the wrong rows."""
    pieces = dict(megatron_weights._ROWS)
    if broken == "query":
        pieces["query"] = lambda parts, s, dim: torch.cat(parts)[: s.num_heads * s.head_dim]
    elif broken == "gate":
        pieces |= {"gate": pieces["up"], "up": pieces["gate"]}
    else:
        pieces["key"] = lambda parts, s, dim: (
            megatron_weights._KEY(parts, s, dim)
            .unflatten(0, (s.num_groups, -1))
            .transpose(0, 1)
            .flatten(0, 1)
        )
    monkeypatch.setattr(megatron_weights, "_ROWS", pieces)
    assert convert(written, tmp_path / "out") == 1
    assert "the logits of" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


# Damaged and unsupported checkpoints.


def change(folder, edit, rank="mp_rank_01_001"):
    path = folder / rank / "model_optim_rng.pt"
    from megatrain.conversion.megatron_legacy import _IGNORED, InertObject

    with torch.serialization.safe_globals([Namespace, *((InertObject, name) for name in _IGNORED)]):
        state = torch.load(path, weights_only=True)
    state = {name: value for name, value in state.items() if name != "rng_state"}
    state["model"] = {
        name: value for name, value in state["model"].items() if isinstance(value, torch.Tensor)
    }
    edit(state)
    if "args" in state:
        state["args"].model_type = None
    torch.save(state, path)


def all_args(name, value):
    def edit(folder):
        for rank in folder.glob("mp_rank_*"):
            change(folder, lambda state: setattr(state["args"], name, value), rank.name)

    return edit


NORM = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
DAMAGES = {
    "lacks tensor rank 1 of pipeline rank 1 (2 x 2 ranks)": lambda folder: shutil.rmtree(
        folder / "mp_rank_01_001"
    ),
    "contains neither model_optim_rng.pt nor model_rng.pt": lambda folder: (
        folder / "mp_rank_00_000" / "model_optim_rng.pt"
    ).unlink(),
    "is a folder of expert ranks, which are not supported": lambda folder: (
        folder / "mp_rank_00_000_000"
    ).mkdir(),
    "is missing on tensor rank 1": lambda folder: change(folder, lambda s: s["model"].pop(NORM)),
    "has other values on tensor rank 1 than on rank 0": lambda folder: change(
        folder, lambda s: s["model"][NORM].add_(1)
    ),
    "has shape (30,) on tensor rank 1 and (32,) on rank 0": lambda folder: change(
        folder, lambda s: s["model"].update({NORM: torch.ones(30)})
    ),
    "contains decoder.layers.1.mlp.router.weight": lambda folder: [
        change(
            folder,
            lambda s: s["model"].update({"decoder.layers.0.mlp.router.weight": torch.ones(3)}),
            f"mp_rank_0{rank}_001",
        )
        for rank in (0, 1)
    ],
    "must be a tensor, not list": lambda folder: change(
        folder, lambda s: s["model"].update({"decoder.x": [1]})
    ),
    "has checkpoint_version 0": lambda folder: change(
        folder, lambda s: s.pop("checkpoint_version")
    ),
    "contains no model": lambda folder: change(folder, lambda s: s.pop("model")),
    "which do not count from 0": lambda folder: change(
        folder, lambda s: s["model"].update({"decoder.layers.5.x": torch.ones(1)})
    ),
    "contains 2 ranks, but its args have pipeline_model_parallel_size=4": all_args(
        "pipeline_model_parallel_size", 4
    ),
    "num_experts=8 in its args is not supported": all_args("num_experts", 8),
    "position_embedding_type=alibi in its args is not supported": all_args(
        "position_embedding_type", "alibi"
    ),
    "rotary_percent=0.5 in its args": all_args("rotary_percent", 0.5),
    "num_layers=two in its args must be at least 1": all_args("num_layers", "two"),
    "require 128 in total": all_args("kv_channels", 16),
    "transformers has no model with rope, RMSNorm and a plain MLP": all_args("swiglu", False),
    "lacks model.layers.2.": all_args("num_layers", 3),
    "rows, which cannot be split into gate and up": lambda folder: [
        change(
            folder,
            lambda s: s["model"].update(
                {"decoder.layers.0.mlp.linear_fc1.weight": torch.ones(47, 32)}
            ),
            f"mp_rank_0{rank}_001",
        )
        for rank in (0, 1)
    ],
    "the last stage's copy differs from the first stage's": all_args(
        "untie_embeddings_and_output_weights", False
    ),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_damaged_checkpoint_is_rejected(sentence, written, tmp_path, capfd):
    DAMAGES[sentence](written)
    assert convert(written, tmp_path / "out", "--vocab-size", "67") == 1
    err = capfd.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["nine", "../7", "12345678901", "8"])
def test_tracker_without_a_folder(word, written, tmp_path, capfd):
    root = tmp_path / "root"
    root.mkdir()
    shutil.copytree(written, root / "iter_0000007")
    (root / "latest_checkpointed_iteration.txt").write_text(word)
    assert convert(root, tmp_path / "out") == 1
    assert "latest_checkpointed_iteration.txt " in capfd.readouterr().err


class Runs:
    """Pickles to a call of a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("place", ["model", "args", "rng_state"])
def test_checkpoint_runs_no_code(place, written, tmp_path, capfd):
    trace = tmp_path / "ran"
    change(
        written,
        lambda s: (
            s.__setitem__(place, Runs(trace))
            if place != "args"
            else setattr(s["args"], "x", Runs(trace))
        ),
    )
    assert convert(written, tmp_path / "out") == 1
    assert (
        "is damaged, or contains more than tensors, which could run code when it is read"
        in capfd.readouterr().err
    )
    assert not trace.exists()


def test_conflicting_vocabulary_sizes(written, tmp_path, capfd):
    assert (
        convert(written, tmp_path / "out", "--config", tmp_path / "hf", "--vocab-size", "60") == 1
    )
    assert "--vocab-size 60 differs from vocab_size=67 of --config" in capfd.readouterr().err
    assert convert(tmp_path / "hf", tmp_path / "out", "--vocab-size", "60") == 1
    assert "has a config.json; leave --config" in capfd.readouterr().err
    assert convert(written, tmp_path / "out", "--vocab-size", "80") == 1
    assert "of shape (68, 32), but its config requires (80, 32)" in capfd.readouterr().err
