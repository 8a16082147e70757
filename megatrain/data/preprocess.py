"""Preprocessing of text files to PREFIX.bin and PREFIX.idx.

    read_blocks --> worker_processes.py: parse, encode --> IndexedWriter

Every document ends with the end-of-document token. The tokenizer's own special tokens, such as one
for the beginning of a sequence, are not added.
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
class PreprocessResult:
    """The counts of a call of `preprocess`.

    Attributes:
        prefix: the path of the dataset without .bin and .idx.
        documents: the documents written.
        tokens: the tokens written, end-of-document tokens included.
        bytes: the size of the text in UTF-8.
        seconds: the duration.
        skipped: the number of records left out, by reason.
        ignored: files of other formats and links to folders, found in the input folders.
    """

    prefix: Path
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    skipped: Counter[str] = field(default_factory=Counter)
    ignored: list[Path] = field(default_factory=list)


class PreprocessSpec(NamedTuple):
    """The settings with which a worker process encodes blocks.

    Attributes:
        tokenizer: the content of tokenizer.json.
        end_of_document: the token that ends documents.
        dtype: the type of the tokens.
        field: the field of JSON lines that contains the text.
    """

    tokenizer: str
    end_of_document: int
    dtype: np.dtype[Any]
    field: str


class EncodedTexts(NamedTuple):
    """The documents of one block, concatenated."""

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
) -> PreprocessResult:
    """Encodes every document of text files and writes an indexed dataset.

    Args:
        inputs: files, folders and globs; see `text_files.py` for the formats.
        tokenizer: the folder of the tokenizer.
        output: the prefix of the dataset.
        workers: the number of processes, by default one per core. 1 means this process.
        field: the field or column that contains the text.
        on_error: "skip" leaves out records that are not documents and counts them.
        progress: the output of a progress bar.

    Raises:
        DataError: an input cannot be read, a record is not a document (unless skipped), or the
            dataset cannot be written.
    """
    found = find_inputs(inputs)
    loaded = load_tokenizer(tokenizer)
    vocab_size = len(loaded)
    spec = PreprocessSpec(
        loaded.backend_tokenizer.to_str(),
        end_of_document_id(loaded),
        token_dtype(vocab_size),
        field,
    )
    result = PreprocessResult(Path(output), ignored=found.ignored)
    started = time.monotonic()
    workers = workers or len(os.sched_getaffinity(0))
    with (
        progress_bar(None, unit="B", description="preprocess", stream=progress) as bar,
        IndexedWriter(output, vocab_size=vocab_size) as writer,
    ):
        blocks = read_blocks(found.files, field=field)
        for encoded in map_blocks(blocks, make_encoder, spec, workers=workers):
            if encoded.problems and on_error == "stop":
                raise DataError(
                    f"{encoded.problems[0]}; --on-error skip leaves out and counts such records"
                )
            result.skipped.update(problem.reason for problem in encoded.problems)
            writer.add_documents(encoded.tokens, lengths=encoded.lengths)
            result.bytes += encoded.text_bytes
            bar.set_postfix_str(f"{writer.num_tokens / 1e6:,.1f}M tokens", refresh=False)
            bar.update(encoded.text_bytes)
        if result.skipped and not writer.num_documents:
            raise _all_skipped(result)
    result.documents, result.tokens = writer.num_documents, writer.num_tokens
    result.seconds = time.monotonic() - started
    return result


def _all_skipped(result: PreprocessResult) -> DataError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.skipped.most_common())
    return DataError(
        f"{result.prefix}: there are no documents to write; all records were skipped: {reasons}"
    )


def make_encoder(spec: PreprocessSpec) -> Callable[[TextBlock], EncodedTexts]:
    """Returns a function that encodes blocks in this process, on one core."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(spec.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(block: TextBlock) -> EncodedTexts:
        texts, problems = parse_texts(block, field=spec.field)
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        documents = [encoding.ids for encoding in encodings]
        lengths = [len(ids) + 1 for ids in documents]
        tokens = np.empty(sum(lengths), dtype=spec.dtype)
        start = 0
        for ids, length in zip(documents, lengths, strict=True):
            tokens[start : start + length - 1] = ids
            tokens[start + length - 1] = spec.end_of_document
            start += length
        return EncodedTexts(tokens, lengths, sum(_utf8_length(text) for text in texts), problems)

    return encode


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
