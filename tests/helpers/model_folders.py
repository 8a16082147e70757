"""Small folders of tensors in each of Hugging Face's formats for models."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

TENSORS = {
    "a.weight": torch.arange(35, dtype=torch.float32).view(7, 5),
    "a.bias": torch.arange(7, dtype=torch.bfloat16),
    "b.weight": torch.arange(48, dtype=torch.float16).view(4, 3, 4),
    "b.flags": torch.tensor([True, False, True]),
    "c.scalar": torch.tensor(3, dtype=torch.int64),
    "c.nothing": torch.empty(0, 4),
}
SHARDS = [
    {name: tensor for name, tensor in TENSORS.items() if name.startswith(letter)}
    for letter in "abc"
]


def write(folder, kind):
    """Writes the tensors TENSORS to a folder in one of the formats KINDS."""
    folder.mkdir()
    stem, suffix = (
        ("model", "safetensors") if kind.startswith("safetensors") else ("pytorch_model", "bin")
    )

    def save(tensors, name):
        if suffix == "safetensors":
            save_file(tensors, folder / name, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / name, _use_new_zipfile_serialization=kind != "old bin")

    if kind.endswith("shards"):
        names = [f"{stem}-{number:05d}-of-00003.{suffix}" for number in (1, 2, 3)]
        for tensors, name in zip(SHARDS, names, strict=True):
            save(tensors, name)
        weight_map = {
            key: name for tensors, name in zip(SHARDS, names, strict=True) for key in tensors
        }
        (folder / f"{stem}.{suffix}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    else:
        save(TENSORS, f"{stem}.{suffix}")
    return folder


KINDS = ("safetensors", "safetensors shards", "bin", "bin shards", "old bin")
