"""Adapter runs on any layout, and the same training with peft on transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from helpers.reference_model import give_weights, make_stage, run_steps, train
from helpers.training_runs import laid_over, microbatches
from megatrain.config import loader as configuration
from megatrain.distributed.mesh import make_mesh
from megatrain.models.config import load_hf_config, read_config
from megatrain.ops.random import normal_slice

STEPS, BATCH, LENGTH, LR = 2, 8, 12, 1e-3
LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "neox": {
        "model_type": "gpt_neox",
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "phi3": {**LLAMA, "model_type": "phi3", "num_hidden_layers": 2, "pad_token_id": 0},
    # rows of whole blocks of 64 on two tensor ranks
    "wide": {**LLAMA, "hidden_size": 64, "head_dim": 32, "intermediate_size": 128},
    "wide-gpt2": {
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_embd": 128,
        "n_inner": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
LAST = ["layers.3.self_attn.v_proj", "layers.3.mlp.down_proj"]


def make_config(model: str, lora: dict, **settings):
    values = {
        "train.steps": STEPS,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": 2,
        "data.sequence_length": LENGTH,
        "optimizer.lr": LR,
        "lr_schedule.name": "constant",
        "optimizer.grad_clip": 0.5,
        "run.seed": 7,
    }
    return configuration.from_dict(
        laid_over(
            {"model": MODELS[model], "lora": {"rank": 4, "alpha": 6, **lora}}, values | settings
        )
    )


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 67, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def scrambled(name: str, shape: tuple[int, ...], value: torch.Tensor) -> torch.Tensor:
    """Randomizes B and DoRA's magnitudes, or half of the gradients would be zero."""
    return (
        value
        if "lora_A" in name
        else value + normal_slice(99, name, shape, tuple(slice(0, size) for size in shape), std=0.1)
    )


@cache
def reference(model: str, kind: str, *, quantized_in: Path | None = None):
    """Trains peft on transformers with torch.optim.AdamW, from our initial weights.

    Args:
        quantized_in: a folder from which transformers loads the model in 4 bits.
    """
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from transformers import AutoModelForCausalLM

    config, hf_config = make_config(model, KINDS[kind]), load_hf_config(MODELS[model])
    hf_config._attn_implementation = "eager"
    network = AutoModelForCausalLM.from_config(hf_config)
    adapters = give_weights(make_stage(config, read_config(hf_config)), network)
    if quantized_in is not None:
        network = in_4_bits(network, quantized_in)
    network = get_peft_model(
        network,
        LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            target_modules=config.lora.targets,
            use_rslora=config.lora.rslora,
            use_dora=config.lora.dora,
            fan_in_fan_out=model == "gpt2",
            task_type="CAUSAL_LM",
        ),
    )
    if quantized_in is not None:  # norms of what the codes stand for are peft's own to know
        adapters |= {
            name: value
            for name, value in get_peft_model_state_dict(network).items()
            if "magnitude" in name
        }
    missed = set_peft_model_state_dict(
        network, {name: scrambled(name, value.shape, value) for name, value in adapters.items()}
    )
    assert not missed.unexpected_keys
    network.train()
    trained = trained_by_name(network)
    assert set(trained) == set(adapters)

    def loss(step: int) -> torch.Tensor:
        batch = tokens(step)
        logits = network(input_ids=batch[:, :-1]).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return train(trained, loss, steps=STEPS, lr=LR)


def trained_by_name(network):
    """Returns the tensors that peft trains, by the names in its files."""
    found = {}
    for name, parameter in network.named_parameters():
        for word in (".modules_to_save.default", ".default"):
            name = name.replace(word, "")
        if parameter.requires_grad:
            found[name.replace("vector.weight", "vector")] = parameter
    return found


def in_4_bits(network, folder: Path):
    """Loads the network in 4 bits, as transformers does with bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    network.save_pretrained(folder)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, attn_implementation="eager"
    )


@torch.no_grad()
def scramble(optimizer) -> None:
    for fragment in optimizer.state.fragments():
        s = fragment.sharding
        master = fragment.tensors["master"]
        part = s.shard(scrambled(s.name, s.shape, torch.zeros(s.shape)))
        master.add_(part.flatten()[fragment.start : fragment.start + master.numel()])
    optimizer.state.copy_masters_to_weights()


def run_layout(rank: int, world_size: int, config):
    from megatrain.training.step_runner import StepRunner

    p = config.parallel
    mesh = make_mesh(rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size))
    runner = StepRunner(
        config, read_config(load_hf_config(config.model)), mesh, torch.device("cpu")
    )
    scramble(runner.optimizer)
    frozen = [(p, p.detach().clone()) for p in runner.stage.parameters() if not p.requires_grad]
    ran = run_steps(
        runner,
        lambda step: microbatches(tokens(step), config.train.micro_batch_size, mesh.data),
        steps=STEPS,
    )
    assert all(
        torch.equal(p, before) and p.grad is None and not hasattr(p, "main_grad")
        for p, before in frozen
    )
    return ran


KINDS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "last": {"targets": LAST},
    "last-dora": {"targets": LAST, "dora": True},
    "dropped": {"targets": ["q_proj", "v_proj", "up_proj"], "dropout": 0.4, "dora": True},
}


def row(model="llama", kind="lora", world=1, **settings):
    name = "-".join([model, kind, f"w{world}", *(f"{k}{v}" for k, v in settings.items())])
    return pytest.param(model, kind, world, settings, id=name)


TP, PP, TP_PP = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}


def layout(model: str, kind: str, settings: dict, **more):
    """Returns the config of a row; settings not in `parallel` are in `train`."""
    train = ("recompute", "micro_batch_size")
    return make_config(
        model,
        KINDS[kind],
        **{
            f"{'train' if key in train else 'parallel'}.{key}": value
            for key, value in settings.items()
        },
        **more,
    )
