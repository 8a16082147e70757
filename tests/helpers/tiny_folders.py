"""Tiny models of transformers, and `megatrain convert` as a user calls it."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.messages import split_error

VOCABULARY = 67
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **SIZES,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SIZES}


def random_model(fields, seed=0):
    """Returns a transformers model whose parameters are all random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(fields)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def make_folder(folder, fields, seed=0, shard="20KB"):
    model = random_model(fields, seed)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def tensors_of(folder):
    """Returns dtype, shape and bytes of every tensor."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = (
                    tensor.dtype,
                    tuple(tensor.shape),
                    tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
                )
    return found


def convert(*arguments):
    from megatrain.__main__ import main

    return main(["convert", *map(str, arguments)])


def to_hf(source, target, *options):
    return convert(source, target, "--to", "hf", *options)


def error_of(capfd, *arguments):
    """Returns the message of a conversion that fails without writing."""
    target = Path(arguments[1])
    before = sorted(target.iterdir()) if target.is_dir() else None
    assert convert(*arguments) == 1
    assert (sorted(target.iterdir()) if target.is_dir() else None) == before
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".converting")]
    message, _ = split_error(capfd.readouterr().err)
    return message


def edit_tensors(folder, change):
    """Changes tensors of the folder and writes all to one file."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
