"""The documents that perplexity is taken of, as tokens and with the sizes that it is divided by.

Text files are read as preprocessing reads them. A document of an indexed dataset is the same without the token that ends
it: both give the same figures. Before each document stands the tokenizer's beginning (or else end) of a text, so that the
first token is predicted too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.records import RecordProblem, TextBlock, parse_objects, parse_texts
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import DataError


class Text(NamedTuple):
    """A document: a prefix token where there is one, then the text's own. Sizes are None where no tokenizer tells them."""

    tokens: list[int]
    num_bytes: int | None
    num_words: int | None


def is_indexed(path: str) -> bool:
    return Path(f"{path}.idx").is_file()


def read_texts(
    data: Sequence[str], *, tokenizer: Any, prefix: int | None, field: str, vocab_size: int
) -> Iterator[Text]:
    """All documents in order; DataError for a file that holds something else."""
    for path in data:
        if is_indexed(path):
            yield from _indexed_texts(path, tokenizer, prefix, vocab_size)
        elif tokenizer is None:
            raise DataError(
                f"{path} is text, and there is no tokenizer beside the model; give data.tokenizer=FOLDER"
            )
        else:
            yield from _file_texts(path, tokenizer, prefix, field)


def _file_texts(path: str, tokenizer: Any, prefix: int | None, field: str) -> Iterator[Text]:
    for block in read_blocks(find_inputs([path]).files, field=field):
        texts, problems = parse_texts(block, field=field)
        if problems:
            raise DataError(f"{problems[0]}{_other_fields(block, problems[0], field)}")
        for text, tokens in zip(
            texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True
        ):
            yield _sized(text, tokens, prefix)


def _other_fields(block: TextBlock, problem: RecordProblem, field: str) -> str:
    """Where a line lacks the field, those that it has; nothing for other problems."""
    if block.form != "line":
        return ""
    objects, _ = parse_objects(block)
    names = next((list(value) for number, value in objects if number == problem.number), [])
    if not names or field in names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"; it has {', '.join(name[:40] for name in names[:_SHOWN])}{more}, and --field says which of them is the text"


_SHOWN = 8
"""Names of fields that a message lists."""


def _indexed_texts(
    path: str, tokenizer: Any, prefix: int | None, vocab_size: int
) -> Iterator[Text]:
    dataset = IndexedDataset(path)
    end = None if tokenizer is None else tokenizer.eos_token_id
    for number in range(dataset.num_documents):
        tokens = [int(token) for token in dataset.document(number)]
        if tokens and (max(tokens) >= vocab_size or min(tokens) < 0):
            raise DataError(
                f"{path}.bin: document {number} holds token id {max(tokens)}, outside the vocabulary of {vocab_size}"
            )
        if tokens and tokens[-1] == (prefix if end is None else end):
            tokens.pop()
        if tokenizer is None:
            yield Text([*_before(prefix), *tokens], None, None)
        else:
            yield _sized(
                tokenizer.decode(tokens, clean_up_tokenization_spaces=False), tokens, prefix
            )


def _sized(text: str, tokens: list[int], prefix: int | None) -> Text:
    return Text(
        [*_before(prefix), *tokens], len(text.encode("utf-8", errors="replace")), count_words(text)
    )


def _before(prefix: int | None) -> list[int]:
    return [] if prefix is None else [prefix]


def count_words(text: str) -> int:
    """As lm-evaluation-harness counts them: pieces between white space, empty ones at the ends included."""
    return len(re.split(r"\s+", text))
