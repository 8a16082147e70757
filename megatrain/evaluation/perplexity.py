"""Perplexity of documents, each seen through a sliding window that starts after a prefix token.

Text files are read as preprocessing reads them. A document of an indexed dataset is taken without
its end-of-text token: both forms give the same figures. The tokenizer's BOS token (or else EOS)
precedes each document, so that its first token is predicted too.

The prefix and the text form one sequence. Window 4, stride 2, a sequence of 9 tokens:

    sequence    p a b c d e f g h
    window 0    p a b c              predicts a b c d
    window 1        b c d e          predicts       e f     with two tokens of context more
    window 2            d e f g      predicts           g h

Every token after the first is predicted once. lm-evaluation-harness uses a stride of the whole
window. A smaller one costs more but gives more context, as in transformers' guide to perplexity.
The last window reaches back as far as it can.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.records import RecordProblem, TextBlock, parse_objects, parse_texts
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import DataError
from megatrain.evaluation.loglikelihood import Row, Scorer, make_row
from megatrain.evaluation.spec import EvalSpec

_MAX_FIELDS = 8
"""Names of fields that a message lists."""


class Window(NamedTuple):
    """Inputs [start:stop] and labels [start + 1 : stop + 1], of which the last `scored` count."""

    start: int
    stop: int
    scored: int


def make_windows(predictions: int, *, window: int, stride: int) -> Iterator[Window]:
    """Yields windows of at most `window` tokens over a sequence of `predictions` + 1 tokens."""
    assert 1 <= stride <= window, (stride, window)
    done = 0
    while done < predictions:
        stop = min(done + (stride if done else window), predictions)
        yield Window(max(0, stop - window), stop, stop - done)
        done = stop


def make_rows(tokens: Sequence[int], *, window: int, stride: int) -> Iterator[Row]:
    """Yields the rows that predict every token after the first."""
    for start, stop, scored in make_windows(len(tokens) - 1, window=window, stride=stride):
        yield make_row(tokens[start : stop + 1], scored=scored)


class Document(NamedTuple):
    """Tokens of a document, the prefix first; its sizes are None without a tokenizer."""

    tokens: list[int]
    num_bytes: int | None
    num_words: int | None


def is_indexed(path: str) -> bool:
    """Returns whether the path is the prefix of an indexed dataset."""
    return Path(f"{path}.idx").is_file()


def read_documents(
    data: Sequence[str], *, tokenizer: Any, prefix: int | None, field: str, vocab_size: int
) -> Iterator[Document]:
    """Yields the documents of text files and indexed datasets, each after the prefix token.

    Raises DataError if a file has another format, or tokens beyond the vocabulary.
    """
    for path in data:
        if is_indexed(path):
            yield from _indexed_documents(path, tokenizer, prefix, vocab_size)
        elif tokenizer is None:
            raise DataError(
                f"{path} is text, but the model's folder has no tokenizer; "
                "set data.tokenizer to the folder of one"
            )
        else:
            yield from _text_documents(path, tokenizer, prefix, field)


def _text_documents(
    path: str, tokenizer: Any, prefix: int | None, field: str
) -> Iterator[Document]:
    for block in read_blocks(find_inputs([path]).files, field=field):
        texts, problems = parse_texts(block, field=field)
        if problems:
            raise DataError(f"{problems[0]}{_list_fields(block, problems[0], field)}")
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for text, text_tokens in zip(texts, tokens, strict=True):
            yield _make_document(text, text_tokens, prefix)


def _list_fields(block: TextBlock, problem: RecordProblem, field: str) -> str:
    """Returns a hint with the fields of the line that lacks `field`; empty for other problems."""
    if block.form != "line":
        return ""
    objects, _ = parse_objects(block)
    names = next((list(value) for number, value in objects if number == problem.number), [])
    if not names or field in names:
        return ""
    more = ", ..." if len(names) > _MAX_FIELDS else ""
    listed = ", ".join(name[:40] for name in names[:_MAX_FIELDS])
    return f"; it has {listed}{more}: name the field of the text with --field"


def _indexed_documents(
    path: str, tokenizer: Any, prefix: int | None, vocab_size: int
) -> Iterator[Document]:
    dataset = IndexedDataset(path)
    end = prefix if tokenizer is None or tokenizer.eos_token_id is None else tokenizer.eos_token_id
    for number in range(dataset.num_documents):
        tokens = [int(token) for token in dataset.document(number)]
        if tokens and (max(tokens) >= vocab_size or min(tokens) < 0):
            raise DataError(
                f"{path}.bin: document {number} contains token {max(tokens)}, which exceeds "
                f"vocab_size={vocab_size} of the model"
            )
        if tokens and tokens[-1] == end:
            tokens.pop()
        if tokenizer is None:
            yield Document([*_as_list(prefix), *tokens], None, None)
        else:
            text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            yield _make_document(text, tokens, prefix)


def _make_document(text: str, tokens: list[int], prefix: int | None) -> Document:
    num_bytes = len(text.encode("utf-8", errors="replace"))
    return Document([*_as_list(prefix), *tokens], num_bytes, count_words(text))


def _as_list(prefix: int | None) -> list[int]:
    return [] if prefix is None else [prefix]


def count_words(text: str) -> int:
    """Returns the number of words as lm-evaluation-harness counts them.

    They are pieces between white space, including empty ones at the ends.
    """
    return len(re.split(r"\s+", text))


@dataclass
class PerplexityResult:
    """Sums over documents. Bytes and words are None if a document has no text."""

    documents: int = 0
    tokens: int = 0
    num_bytes: int | None = 0
    num_words: int | None = 0
    loglikelihood: float = 0.0

    def add(
        self, *, loglikelihood: float, tokens: int, num_bytes: int | None, num_words: int | None
    ) -> None:
        """Adds a document and the log-likelihood of its tokens."""
        self.documents += 1
        self.tokens += tokens
        self.loglikelihood += loglikelihood
        self.num_bytes = _add(self.num_bytes, num_bytes)
        self.num_words = _add(self.num_words, num_words)

    def metrics(self) -> dict[str, float | int | None]:
        """Returns loss (nats a token), perplexities, bits per byte and per word, and the sums."""
        loss = -self.loglikelihood
        bits = loss / math.log(2)
        return {
            "loss": loss / self.tokens,
            "perplexity": _exp(loss / self.tokens),
            "bits_per_byte": bits / self.num_bytes if self.num_bytes else None,
            "bits_per_word": bits / self.num_words if self.num_words else None,
            "word_perplexity": _exp(loss / self.num_words) if self.num_words else None,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "words": self.num_words,
        }


def _add(total: int | None, count: int | None) -> int | None:
    return None if total is None or count is None else total + count


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def measure_perplexity(
    spec: EvalSpec, scorer: Scorer, tokenizer: Any, prefix: int | None, vocab_size: int
) -> PerplexityResult:
    """Returns the sums over all documents of `spec.data`; all ranks call it together."""
    documents = read_documents(
        spec.data, tokenizer=tokenizer, prefix=prefix, field=spec.field, vocab_size=vocab_size
    )
    pending: deque[tuple[Document, int]] = deque()
    """Documents whose rows are being scored, and the number of their rows."""

    def rows() -> Iterator[Row]:
        for document in documents:
            sizes = {"window": spec.window, "stride": spec.stride}
            num_rows = sum(1 for _ in make_windows(len(document.tokens) - 1, **sizes))
            if num_rows:
                pending.append((document, num_rows))
                yield from make_rows(document.tokens, **sizes)

    result = PerplexityResult()
    scores = scorer.scores(rows())
    for first in scores:
        document, num_rows = pending.popleft()
        rest = sum(next(scores).loglikelihood for _ in range(num_rows - 1))
        result.add(
            loglikelihood=first.loglikelihood + rest,
            tokens=len(document.tokens) - 1,
            num_bytes=document.num_bytes,
            num_words=document.num_words,
        )
    if not result.tokens:
        raise DataError(f"{', '.join(spec.data)} contains no document of at least 2 tokens")
    return result
