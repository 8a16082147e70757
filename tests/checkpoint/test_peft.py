"""Checkpoints of LoRA runs: peft loads them, resumes are bit-exact, and adapters can be merged."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers.adapter_runs import BATCH, LENGTH, LORAS, batches, train_and_resume
from helpers.networks import GPT2, LLAMA, build, logits, make_microbatch, transformers_twin
from helpers.networks import tokens as some_tokens
from helpers.rank_pool import run_ranks
from safetensors.torch import load_file

from megatrain.checkpoint import manifest, resume
from megatrain.checkpoint.optimizer_state import OptimizerState
from megatrain.checkpoint.peft import join_shards, make_adapter_config, merge_adapter
from megatrain.config import loader as configuration
from megatrain.config.loader import Config
from megatrain.config.schema import LoraConfig
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.errors import CheckpointError
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.lora import add_adapters

MODELS = {"llama": {**LLAMA, "tie_word_embeddings": True}, "gpt2": GPT2}


def make_config(model: str, **parallel):
    raw = {
        "model": MODELS[model],
        "lora": LORAS[model],
        "run": {"seed": 5},
        "parallel": parallel,
        "data": {"sequence_length": LENGTH},
        "train": {"steps": 4, "global_batch_size": BATCH, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-2},
        "lr_schedule": {"name": "constant"},
    }
    return configuration.from_dict(raw)


def resume_elsewhere(rank: int, world_size: int, config, path: Path):
    """Returns the losses of steps 3 and 4, resumed from step 2 on this layout."""
    from megatrain.training.step_runner import StepRunner

    architecture, mesh = (
        read_config(load_hf_config(config.model)),
        make_mesh(rank, data=world_size),
    )
    runner = StepRunner(config, architecture, mesh, torch.device("cpu"))
    resume.load(path, optimizer=runner.optimizer, global_batch_size=4, mesh=mesh)
    return [runner.train_step(step, batches(step, mesh)).loss for step in (3, 4)]


def load_adapter(model: str, folder: Path):
    """Returns the layers on one rank with the folder's adapter."""
    layers, architecture = build(MODELS[model]), read_config(load_hf_config(MODELS[model]))
    add_adapters(
        layers, architecture, LoraConfig(**LORAS[model]), make_mesh(0, connect=False).tensor
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    for spec, parameter in parameters(layers):
        if parameter.requires_grad:
            parameter.data.copy_(spec.shard(tensors[spec.name]))
    return layers.eval(), architecture


@pytest.mark.parametrize(
    ("model", "world", "parallel"),
    [
        ("llama", 4, {"tensor": 2, "pipeline": 2}),
        ("gpt2", 2, {"zero": 3}),
        ("gpt2", 2, {"tensor": 2}),
    ],
)
def test_peft_loads_a_checkpoint_and_a_resume_is_exact(model, world, parallel, tmp_path):
    from peft import PeftModel

    config = make_config(model, **parallel)
    losses, again, evaluated = run_ranks(
        train_and_resume, world, config, tmp_path / "checkpoints", folder=tmp_path
    )[0]
    assert again == losses
    elsewhere = run_ranks(
        resume_elsewhere,
        1,
        make_config(model),
        tmp_path / "checkpoints" / "step-00000002",
        folder=tmp_path,
    )[0]
    assert elsewhere == pytest.approx(losses, rel=2e-6)
    base = tmp_path / "base"
    transformers_twin(MODELS[model], build(MODELS[model])).save_pretrained(base)
    saved = tmp_path / "checkpoints" / "step-00000004"
    assert manifest.find_problem(saved, hashes=True) is None
    assert not list(saved.glob("model*"))
    frozen = {spec.name for spec, _ in parameters(build(MODELS[model]))}
    assert OptimizerState(saved / "optimizer").names()
    assert not frozen & OptimizerState(saved / "optimizer").names()

    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), saved
    ).eval()
    layers, architecture = load_adapter(model, saved)
    given = some_tokens()
    with torch.no_grad():
        ours = logits(layers, make_microbatch(architecture, given))
        torch.testing.assert_close(theirs(input_ids=given).logits, ours, rtol=0, atol=1e-5)
        held_out = batches(9, make_mesh(0, connect=False))
        loss = [
            torch.nn.functional.cross_entropy(
                theirs(input_ids=b.tokens).logits.flatten(0, 1), b.labels.flatten()
            )
            for b in held_out
        ]
        assert evaluated == pytest.approx(float(torch.stack(loss).mean()), rel=1e-6)

        merged = AutoModelForCausalLM.from_pretrained(
            merge_adapter(saved, base, tmp_path / "merged"), attn_implementation="eager"
        ).eval()
        torch.testing.assert_close(merged(given).logits, ours, rtol=0, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
        assert (plain(given).logits - ours).abs().max() > 1e-3
    theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    mine, other = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(tmp_path / "theirs" / "model.safetensors"),
    )
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6)


@pytest.fixture
def written(tmp_path):
    """A folder with an adapter of llama, as a checkpoint contains it, and its base model."""
    layers, architecture = build(MODELS["llama"]), read_config(load_hf_config(MODELS["llama"]))
    transformers_twin(MODELS["llama"], layers).save_pretrained(tmp_path / "base")
    add_adapters(
        layers, architecture, LoraConfig(**LORAS["llama"]), make_mesh(0, connect=False).tensor
    )
    tensors = {d.name: torch.ones(d.shape) for d, p in parameters(layers) if p.requires_grad}
    from safetensors.torch import save_file

    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "model.safetensors")
    join_shards(
        tmp_path / "adapter",
        [manifest.FileRecord("model.safetensors", 0, "")],
        make_adapter_config(make_config("llama").lora, architecture, init_from=None),
    )
    return tmp_path


def test_merging_refuses_another_base_model(written):
    base = written / "base" / "model.safetensors"
    whole = base.read_bytes()
    other = {**LLAMA, "intermediate_size": 40}
    transformers_twin(other, build(other)).save_pretrained(written / "other")
    with pytest.raises(
        CheckpointError,
        match=r"contains model.layers.0.mlp.* of shape .* and .*adapter is for \[\d+, \d+\]",
    ):
        merge_adapter(written / "adapter", written / "other", written / "out")
    transformers_twin(GPT2, build(GPT2)).save_pretrained(written / "gpt2")
    with pytest.raises(
        CheckpointError,
        match=r"lacks model.layers.* check that the adapter was trained on this model",
    ):
        merge_adapter(written / "adapter", written / "gpt2", written / "out")
    (written / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="adapter is not a readable adapter"):
        merge_adapter(written / "adapter", written / "base", written / "out")
    assert base.read_bytes() == whole
    assert not (written / "out").exists()
    assert not list(written.glob(".tmp-*"))


def check_adapter(folder, config):
    resume.check_adapter(folder, task=config.task, lora=asdict(config.lora))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rank": 0},
            "contains adapters and this run, with lora.rank=0, trains full weights; set lora.rank",
        ),
        ({"alpha": 7.0}, "lora.alpha=6.0 and this run has 7.0"),
        ({"dora": True}, "lora.dora=false and this run has true"),
        ({"quantize": "nf4"}, "lora.quantize=none and this run has nf4"),
    ],
)
def test_resuming_with_other_adapters_is_refused(change, message, tmp_path):
    config = make_config("llama")
    (tmp_path / "train_state.json").write_text(
        json.dumps({"config": configuration.to_dict(config)})
    )
    check_adapter(tmp_path, config)
    with pytest.raises(CheckpointError, match=message):
        check_adapter(tmp_path, replace(config, lora=replace(config.lora, **change)))
    with pytest.raises(
        CheckpointError,
        match=r"was written with task=sft and this run has task=dpo; start a new run",
    ):
        check_adapter(tmp_path, replace(config, task="dpo"))


def test_a_converted_checkpoint_fits_every_task(tmp_path):
    (tmp_path / "train_state.json").write_text(json.dumps({"config": {"train": {}}}))
    check_adapter(tmp_path, replace(Config(), task="dpo"))
    with pytest.raises(
        CheckpointError,
        match=r"contains full weights and this run, with lora.rank=4, trains adapters",
    ):
        check_adapter(tmp_path, make_config("llama"))
