"""Text files to PREFIX.bin and PREFIX.idx.

    read_blocks --> workers.py: parse, encode --> IndexedWriter

The tokenizer's own special tokens are not added (no beginning-of-sequence); every document ends with the
end-of-document token.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np

from megatrain.data.indexed_dataset import IndexedWriter, Tokens, token_dtype
from megatrain.data.records import RecordProblem, TextBlock, parse_texts
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.data.tokenizer import end_of_document_id, load_tokenizer
from megatrain.data.worker_processes import map_blocks
from megatrain.errors import DataError
from megatrain.progress import progress_bar


@dataclass
class Preprocessed:
    """What a run of `preprocess` read and wrote."""

    prefix: Path
    documents: int = 0
    tokens: int = 0  # end-of-document tokens included
    bytes: int = 0  # of text, in UTF-8
    seconds: float = 0.0
    skipped: Counter[str] = field(default_factory=Counter)  # records left out, by reason
    ignored: list[Path] = field(
        default_factory=list
    )  # in the folders given: files of kinds that are not read, links to folders


class PreprocessSpec(NamedTuple):
    """What a worker needs to encode blocks."""

    tokenizer: str  # tokenizer.json, whole
    end_of_document: int
    dtype: np.dtype[Any]
    field: str


class EncodedBlock(NamedTuple):
    """The documents of one block, end to end."""

    tokens: Tokens
    lengths: list[int]
    text_bytes: int
    problems: list[RecordProblem]


def preprocess(
    inputs: Sequence[str | Path],
    *,
    tokenizer: str | Path,
    output: str | Path,
    workers: int | None = None,
    field: str = "text",
    on_error: Literal["stop", "skip"] = "stop",
    progress: TextIO | None = None,
) -> Preprocessed:
    """Encode every document of `inputs` (files, folders, globs) with the tokenizer in a folder; write the data set.

    Raises DataError at the first record that is no document, with file, line and reason, or with on_error="skip"
    counts them by reason in the result. `workers` is the number of processes, by default one for each core; 1 means
    this one. Progress goes to `progress` when given.
    """
    found = find_inputs(inputs)
    loaded = load_tokenizer(tokenizer)
    vocab_size = len(loaded)
    recipe = PreprocessSpec(
        loaded.backend_tokenizer.to_str(),
        end_of_document_id(loaded),
        token_dtype(vocab_size),
        field,
    )
    result = Preprocessed(Path(output), ignored=found.ignored)
    started = time.monotonic()
    blocks = read_blocks(found.files, field=field)
    with (
        progress_bar(None, unit="B", description="preprocess", stream=progress) as bar,
        IndexedWriter(output, vocab_size=vocab_size) as writer,
    ):
        for encoded in map_blocks(
            blocks, make_encoder, recipe, workers=workers or len(os.sched_getaffinity(0))
        ):
            if encoded.problems and on_error == "stop":
                raise DataError(
                    f"{encoded.problems[0]}; --on-error skip leaves such documents out and counts them"
                )
            result.skipped.update(problem.reason for problem in encoded.problems)
            writer.add_documents(encoded.tokens, lengths=encoded.lengths)
            result.bytes += encoded.text_bytes
            bar.set_postfix_str(f"{writer.num_tokens / 1e6:,.1f}M tokens", refresh=False)
            bar.update(encoded.text_bytes)
        if result.skipped and not writer.num_documents:
            reasons = ", ".join(
                f"{count} {reason}" for reason, count in result.skipped.most_common()
            )
            raise DataError(
                f"{output}: there are no documents to write, every record was skipped: {reasons}"
            )
    result.documents, result.tokens = writer.num_documents, writer.num_tokens
    result.seconds = time.monotonic() - started
    return result


def make_encoder(recipe: PreprocessSpec) -> Callable[[TextBlock], EncodedBlock]:
    """Return a function that encodes blocks in this process, on one core."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(recipe.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(block: TextBlock) -> EncodedBlock:
        texts, problems = parse_texts(block, field=recipe.field)
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = [len(some) + 1 for some in ids]
        tokens = np.empty(sum(lengths), dtype=recipe.dtype)
        start = 0
        for some, length in zip(ids, lengths, strict=True):
            tokens[start : start + length - 1] = some
            tokens[start + length - 1] = recipe.end_of_document
            start += length
        return EncodedBlock(tokens, lengths, sum(_utf8_length(text) for text in texts), problems)

    return encode


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
