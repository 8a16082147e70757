"""The files of a Hugging Face folder besides weights: config, generation config, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatrain.models.config import TransformerConfig

TOKENIZER_FILES = ("*token*.json", "*.jinja", "vocab.*", "merges.txt", "*.model", "*.tiktoken")


class Chat(NamedTuple):
    """The chat format that a model was finetuned with.

    Attributes:
        chat_template: its text; None if it is the tokenizer's own.
        stop_tokens: ids at which an answer ends.
    """

    chat_template: str | None
    stop_tokens: Sequence[int]


def write_hf_metadata(
    folder: Path,
    architecture: TransformerConfig,
    *,
    dtype: torch.dtype,
    tokenizer: str | None,
    chat: Chat | None,
) -> None:
    """Writes the files that transformers reads besides the weights.

    Args:
        folder: the folder to write to.
        architecture: the model.
        dtype: of the weights.
        tokenizer: folder of the tokenizer's files, which are copied.
        chat: the chat format; None for other models.
    """
    hf_config = write_config(folder, architecture, dtype=str(dtype).removeprefix("torch."))
    tokenizer_folder = None if tokenizer is None else Path(tokenizer)
    if tokenizer_folder is not None:
        copy_tokenizer(tokenizer_folder, folder)
    if chat is not None and chat.chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat.chat_template, encoding="utf-8")
    if architecture.classifier is None:
        _write_generation_config(folder, hf_config, tokenizer_folder, chat)
    elif tokenizer_folder is not None:
        _set_pad_token(folder, hf_config.pad_token_id)


def write_config(folder: Path, architecture: TransformerConfig, *, dtype: str) -> Any:
    """Writes config.json with the model's class and dtype, such as "bfloat16"; returns it."""
    hf_config = type(architecture.config).from_dict(architecture.config.to_dict())
    hf_config.architectures = [_class_name(hf_config, architecture)]
    hf_config.dtype = dtype
    hf_config.save_pretrained(folder)
    return hf_config


def _class_name(hf_config: Any, architecture: TransformerConfig) -> str:
    """Returns the name of the model's class in transformers."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    classifier = architecture.classifier
    auto_class = AutoModelForCausalLM
    if classifier is not None:
        auto_class = (
            AutoModelForTokenClassification
            if classifier.of_tokens
            else AutoModelForSequenceClassification
        )
    return str(auto_class._model_mapping[type(hf_config)].__name__)


def _set_pad_token(folder: Path, token: int) -> None:
    """Sets the tokenizer's padding token if it has none: classifiers are used in batches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = token
        tokenizer.save_pretrained(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer's files only: their folder may contain a full model."""
    for path in source.iterdir():
        if path.is_file() and any(path.match(pattern) for pattern in TOKENIZER_FILES):
            shutil.copy(path, folder / path.name)


def _write_generation_config(
    folder: Path, hf_config: Any, tokenizer: Path | None, chat: Chat | None
) -> None:
    """Writes `generation_config.json`.

    It follows from the config. For chats it is the tokenizer folder's, with the tokens at which
    answers ended in training added.
    """
    from transformers import GenerationConfig

    GenerationConfig.from_model_config(hf_config).save_pretrained(folder)
    if chat is None:
        return
    file = folder / "generation_config.json"
    source = None if tokenizer is None else tokenizer / file.name
    source = source if source is not None and source.is_file() else file
    # As JSON: transformers refuses to write some of the files that it reads.
    generation = json.loads(source.read_text(encoding="utf-8"))
    previous = generation.get("eos_token_id")
    if not isinstance(previous, list):
        previous = [] if previous is None else [previous]
    if ends := [*chat.stop_tokens, *previous]:
        generation["eos_token_id"] = list(dict.fromkeys(ends))
    file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
