"""Runs of small models on any layout, and the same training with plain torch."""

from __future__ import annotations

from functools import cache

import torch

from helpers.model_variants import BASES
from helpers.networks import transformers_twin
from helpers.reference_model import make_stage, run_steps, train
from helpers.training_runs import checked, laid_over, microbatches
from megatrain.distributed.mesh import make_mesh
from megatrain.models.config import load_hf_config, read_config

STEPS, BATCH, LENGTH, LR = 10, 8, 16, 1e-3
LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "deep": {**LLAMA, "num_hidden_layers": 9, "tie_word_embeddings": True},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 5},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_embd": 32,
        "n_layer": 5,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
PLAIN = tuple(MODELS)
# Weights large enough that scores reach their caps and windows, norms and rotations show.
MODELS |= {
    name: {**BASES[name], "num_hidden_layers": 5, "initializer_range": 0.1}
    for name in ("gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox", "starcoder2")
}
MODELS["dropping copies"] = {**MODELS["gpt2"], "embd_pdrop": 0.2, "resid_pdrop": 0.3}
MODELS["dropping"] = {**MODELS["dropping copies"], "attn_pdrop": 0.1}


def make_config(model: str, **settings):
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
    return checked(laid_over({"model": MODELS[model]}, values | settings))


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 67, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


@cache
def reference(model: str):
    """Trains transformers' model with torch AdamW in one process, from our initial weights."""
    stage = make_stage(make_config(model), read_config(load_hf_config(MODELS[model])))
    network = transformers_twin(MODELS[model], stage).train()

    def loss(step: int) -> torch.Tensor:
        batch = tokens(step)
        logits = network(batch[:, :-1]).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return train(dict(network.named_parameters()), loss, steps=STEPS, lr=LR)


def run_layout(rank: int, world_size: int, config):
    from megatrain.training.autotune import resolve_schedule
    from megatrain.training.step_runner import StepRunner

    p = config.parallel
    mesh = make_mesh(rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size))
    architecture, device = read_config(load_hf_config(config.model)), torch.device("cpu")

    def batches(step: int):
        return microbatches(tokens(step), config.train.micro_batch_size, mesh.data)

    settled = resolve_schedule(config, architecture, mesh, device, batches=lambda: batches(1))
    runner = StepRunner(
        settled.config,
        architecture,
        mesh,
        device,
        schedule=settled.schedule,
        channels=settled.channels,
    )
    return run_steps(runner, batches, steps=STEPS)


def layout(model: str, settings: dict, **more):
    """Returns the config of a row; settings not in `parallel` are in `train`.

    Rows in which four tensor ranks share a layer have two microbatches instead of four: they spend
    their time on many small messages.
    """
    settings = ({"micro_batch_size": BATCH // 2} if settings.get("tensor") == 4 else {}) | settings
    train = ("recompute", "micro_batch_size", "compile")
    return make_config(
        model,
        **{
            f"{'train' if key in train else 'parallel'}.{key}": value
            for key, value in settings.items()
        },
        **more,
    )
