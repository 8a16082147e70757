"""A small tokenizer that the tests of this folder share."""

from __future__ import annotations

import json

import pytest

from megatrain.data.tokenizer import train_tokenizer

TEXTS = [
    "the quick brown fox",
    "jumps over the lazy dog\n\n",
    "naïve café 你好 🙂",
    "a <|endoftext|> inside",
] * 4


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with a trained byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer([folder / "text.jsonl"], vocab_size=300, output=folder / "made")
    return folder / "made"
