"""The files of a Hugging Face folder that are no tensors: config, how to generate, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.config.loader import Config
from megatrain.models.config import TransformerConfig
from megatrain.ops.dtypes import DTYPES

TOKENIZER_FILES = ("*token*.json", "*.jinja", "vocab.*", "merges.txt", "*.model", "*.tiktoken")


class Chat(NamedTuple):
    """What a model that was finetuned on chats needs to go on with them.

    chat_template: its text where it is not the tokenizer's own; stop_tokens: ids at which an answer ends.
    """

    chat_template: str | None
    stop_tokens: Sequence[int]


def write_hf_metadata(
    folder: Path, config: Config, architecture: TransformerConfig, chat: Chat | None
) -> None:
    """Write what transformers reads beside the weights; the tokenizer's files are copied from `data.tokenizer`."""
    hf = write_config(
        folder, architecture, dtype=str(DTYPES[config.train.dtype]).removeprefix("torch.")
    )
    tokenizer = Path(config.data.tokenizer) if config.data.tokenizer is not None else None
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    if chat is not None and chat.chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat.chat_template, encoding="utf-8")
    if architecture.classifier is None:
        _write_generation(folder, hf, tokenizer, chat)
    elif tokenizer is not None:
        _name_padding(folder, hf.pad_token_id)


def write_config(folder: Path, architecture: TransformerConfig, *, dtype: str) -> Any:
    """Writes config.json with the model's class and dtype, such as "bfloat16"; returns the config."""
    hf = type(architecture.config).from_dict(architecture.config.to_dict())
    hf.architectures = [_class_name(hf, architecture)]
    hf.dtype = dtype
    hf.save_pretrained(folder)
    return hf


def _class_name(hf: Any, architecture: TransformerConfig) -> str:
    """Of the model in transformers."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    classifier = architecture.classifier
    kinds = AutoModelForCausalLM
    if classifier is not None:
        kinds = (
            AutoModelForTokenClassification
            if classifier.of_tokens
            else AutoModelForSequenceClassification
        )
    return str(kinds._model_mapping[type(hf)].__name__)


def _name_padding(folder: Path, token: int) -> None:
    """Tell the tokenizer what texts of a batch are padded with, where it has no word for it: classifiers are asked in batches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = token
        tokenizer.save_pretrained(folder)


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copies the files of a tokenizer, whose folder may contain a whole model."""
    for path in tokenizer.iterdir():
        if path.is_file() and any(path.match(pattern) for pattern in TOKENIZER_FILES):
            shutil.copy(path, folder / path.name)


def _write_generation(folder: Path, hf: Any, tokenizer: Path | None, chat: Chat | None) -> None:
    """How to generate, as the config implies it; for chats as the tokenizer's folder says, and ending where answers ended in training."""
    from transformers import GenerationConfig

    GenerationConfig.from_model_config(hf).save_pretrained(folder)
    if chat is None:
        return
    file = folder / "generation_config.json"
    theirs = None if tokenizer is None else tokenizer / file.name
    # As JSON: transformers refuses to write some of the files that it reads.
    generation = json.loads(
        (theirs if theirs is not None and theirs.is_file() else file).read_text(encoding="utf-8")
    )
    before = generation.get("eos_token_id")
    ends = [
        *chat.stop_tokens,
        *(before if isinstance(before, list) else [] if before is None else [before]),
    ]
    if ends:
        generation["eos_token_id"] = list(dict.fromkeys(ends))
    file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
