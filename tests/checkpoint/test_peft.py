"""A LoRA run's checkpoint: peft loads it with equal logits, a run goes on from it bit for bit, and it merges into its base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.networks import GPT2, LLAMA, build, logits, make_microbatch, transformers_twin
from helpers.networks import tokens as some_tokens
from helpers.rank_pool import run_ranks
from helpers.training_runs import microbatches
from safetensors.torch import load_file

from megatrain.checkpoint import manifest, resume
from megatrain.checkpoint import peft as peft_module
from megatrain.checkpoint import resume as loading
from megatrain.checkpoint.checkpointer import Checkpointer
from megatrain.checkpoint.hf_metadata import write_hf_metadata
from megatrain.checkpoint.optimizer_state import OptimizerState
from megatrain.checkpoint.peft import merge_adapter
from megatrain.checkpoint.train_state import TrainState
from megatrain.config import loader as configuration
from megatrain.config.loader import Config
from megatrain.config.schema import LoraConfig
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.errors import CheckpointError
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.lora import add_adapters

MODELS = {"llama": {**LLAMA, "tie_word_embeddings": True}, "gpt2": GPT2}
LORAS = {
    "llama": {"rank": 4, "alpha": 6, "rslora": True},
    "gpt2": {"rank": 3, "alpha": 6, "dora": True, "targets": ["c_attn", "c_proj"]},
}
LENGTH, BATCH = 12, 4


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


def batches(step: int, mesh) -> list[Batch]:
    return microbatches(
        torch.randint(0, 67, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step)),
        1,
        mesh.data,
    )


def save(folder: Path, progress: TrainState, *, zero, config, architecture, mesh) -> Path:
    saver = Checkpointer(
        folder,
        zero=zero,
        config=config,
        architecture=architecture,
        mesh=mesh,
        describe=lambda path: write_hf_metadata(path, config, architecture, None),
    )
    saver.save(progress)
    return saver.finish().path


def train_and_resume(rank: int, world_size: int, config, folder: Path):
    """Losses of steps 3 and 4 when all four are done in one go, and when a new runner goes on from step 2; step 4 saved."""
    from megatrain.training.step_runner import StepRunner

    p, architecture = config.parallel, read_config(load_hf_config(config.model))
    mesh = make_mesh(rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size))
    more = {"config": config, "architecture": architecture, "mesh": mesh}
    first = StepRunner(config, architecture, mesh, torch.device("cpu"))
    losses = [first.train_step(step, batches(step, mesh)).loss for step in (1, 2)]
    path = save(folder, TrainState(2, 0, 2), zero=first.optimizer, **more)
    losses += [first.train_step(step, batches(step, mesh)).loss for step in (3, 4)]
    second = StepRunner(config, architecture, mesh, torch.device("cpu"))
    loading.check(path, config, architecture)
    assert loading.load(path, zero=second.optimizer, config=config, mesh=mesh).step == 2
    again = [second.train_step(step, batches(step, mesh)).loss for step in (3, 4)]
    save(folder, TrainState(4, 0, 4), zero=second.optimizer, **more)
    return losses[2:], again, first.evaluate(lambda number: batches(9, mesh), 1).loss


def resume_elsewhere(rank: int, world_size: int, config, path: Path):
    """Losses of steps 3 and 4 from step 2's checkpoint, on this layout."""
    from megatrain.training.step_runner import StepRunner

    architecture, mesh = (
        read_config(load_hf_config(config.model)),
        make_mesh(rank, data=world_size),
    )
    runner = StepRunner(config, architecture, mesh, torch.device("cpu"))
    loading.load(path, zero=runner.optimizer, config=config, mesh=mesh)
    return [runner.train_step(step, batches(step, mesh)).loss for step in (3, 4)]


def ours_with(model: str, folder: Path):
    """Our layers on one rank with the adapters of the folder."""
    layers, architecture = build(MODELS[model]), read_config(load_hf_config(MODELS[model]))
    add_adapters(
        layers, architecture, LoraConfig(**LORAS[model]), make_mesh(0, connect=False).tensor
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    for declaration, parameter in parameters(layers):
        if parameter.requires_grad:
            parameter.data.copy_(declaration.take(tensors[declaration.name]))
    return layers.eval(), architecture


@pytest.mark.parametrize(
    ("model", "world", "parallel"),
    [
        ("llama", 4, {"tensor": 2, "pipeline": 2}),
        ("gpt2", 2, {"zero": 3}),
        ("gpt2", 2, {"tensor": 2}),
    ],
)
def test_peft_loads_what_a_run_goes_on_from(model, world, parallel, tmp_path):
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
    frozen = {declaration.name for declaration, _ in parameters(build(MODELS[model]))}
    assert OptimizerState(saved / "optimizer").names()
    assert not frozen & OptimizerState(saved / "optimizer").names()

    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), saved
    ).eval()
    layers, architecture = ours_with(model, saved)
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
    """An adapter of llama as a checkpoint has it, without a run, and the base's folder."""
    layers, architecture = build(MODELS["llama"]), read_config(load_hf_config(MODELS["llama"]))
    transformers_twin(MODELS["llama"], layers).save_pretrained(tmp_path / "base")
    add_adapters(
        layers, architecture, LoraConfig(**LORAS["llama"]), make_mesh(0, connect=False).tensor
    )
    tensors = {d.name: torch.ones(d.shape) for d, p in parameters(layers) if p.requires_grad}
    from safetensors.torch import save_file

    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "model.safetensors")
    peft_module.join(
        tmp_path / "adapter",
        [manifest.FileRecord("model.safetensors", 0, "")],
        make_config("llama"),
        architecture,
    )
    return tmp_path


def test_merging_refuses_what_does_not_belong_together(written):
    base = written / "base" / "model.safetensors"
    whole = base.read_bytes()
    other = {**LLAMA, "intermediate_size": 40}
    transformers_twin(other, build(other)).save_pretrained(written / "other")
    with pytest.raises(
        CheckpointError,
        match=r"has model.layers.0.mlp.* of shape \(\d+, \d+\), and .*adapter is for \[\d+, \d+\]",
    ):
        merge_adapter(written / "adapter", written / "other", written / "out")
    transformers_twin(GPT2, build(GPT2)).save_pretrained(written / "gpt2")
    with pytest.raises(CheckpointError, match=r"holds no model.layers.* is it the model"):
        merge_adapter(written / "adapter", written / "gpt2", written / "out")
    (written / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="adapter is no readable adapter"):
        merge_adapter(written / "adapter", written / "base", written / "out")
    assert base.read_bytes() == whole
    assert not (written / "out").exists()
    assert not list(written.glob(".writing*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rank": 0},
            "holds adapters and this run, with lora.rank=0, trains whole weights; set lora.rank=4",
        ),
        ({"alpha": 7.0}, "lora.alpha=6.0 and this run has lora.alpha=7.0"),
        ({"dora": True}, "lora.dora=false and this run has lora.dora=true"),
        ({"quantize": "nf4"}, "lora.quantize=none and this run has lora.quantize=nf4"),
    ],
)
def test_resuming_with_other_adapters_is_refused(change, words, tmp_path):
    config = make_config("llama")
    (tmp_path / "train_state.json").write_text(
        json.dumps({"config": configuration.to_dict(config)})
    )
    resume.check_adapter(tmp_path, config)
    with pytest.raises(CheckpointError, match=words):
        resume.check_adapter(tmp_path, replace(config, lora=replace(config.lora, **change)))
    with pytest.raises(
        CheckpointError,
        match=r"was written with task=sft and this run has task=dpo; start a new run",
    ):
        resume.check_adapter(tmp_path, replace(config, task="dpo"))


def test_a_converted_checkpoint_is_of_no_task(tmp_path):
    (tmp_path / "train_state.json").write_text(json.dumps({"config": {"train": {}}}))
    resume.check_adapter(tmp_path, replace(Config(), task="dpo"))
    with pytest.raises(
        CheckpointError,
        match=r"holds whole weights and this run, with lora.rank=4, trains adapters",
    ):
        resume.check_adapter(tmp_path, make_config("llama"))
