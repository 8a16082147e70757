"""The small files beside a model's tensors: its config, how to generate, its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatrain.checkpoint.hf_metadata import TOKENIZER_FILES
from megatrain.conversion.sources import Source


def write_descriptions(folder: Path, source: Source, *, dtype: str, tokenizer: Path | None) -> None:
    """config.json and generation_config.json, and the tokenizer of `tokenizer` or else of the source."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config: Any = type(source.config).from_dict(source.config.to_dict())
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    theirs = source.extras / "generation_config.json" if source.extras is not None else None
    if theirs is not None and theirs.is_file():
        shutil.copyfile(theirs, folder / theirs.name)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    home = tokenizer or source.extras
    for path in tokenizer_files(home) if home is not None else []:
        shutil.copyfile(path, folder / path.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """What is a tokenizer's in a folder that may be a whole model's."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(path.match(pattern) for pattern in TOKENIZER_FILES)
    ]
