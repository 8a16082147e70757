"""Texts with labels: JSONL or parquet to samples, as a function of (seed, position).

| task                                | a record                                                       |
|-------------------------------------|----------------------------------------------------------------|
| classification, single-label        | `text`, `label`: a class's name or number                      |
| classification, multi-label         | `text`, `labels`: a list of them, which may be empty           |
| classification, regression          | `text`, `label`: a number                                      |
| token-classification                | `tokens`: words, `labels`: a class for each; null has no loss  |

A sample is one text, cut or padded at its end. Its label stands at the token that a classifier of transformers looks at: the last
that is not padding; the label of a word stands at the word's first token. Files are read whole by every rank, which is meant
for data that are small beside a model: MOST_BYTES at most.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from megatrain.config.schema import Augment, Problem
from megatrain.data.gpt_dataset import IGNORE_INDEX, Sample
from megatrain.data.label_targets import encode_classes, encode_value
from megatrain.data.records import parse_objects
from megatrain.data.shuffle import Shuffle, keyed_integers
from megatrain.data.text_augmentation import augment, mask_word, split_words
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import DataError

MOST_BYTES = 1 << 30


class LabelledText(NamedTuple):
    """A text's words, each with the white space around it, and targets' numbers: of each word, or one of the whole text."""

    words: list[str]
    targets: list[int | None]


class LabelSpec(NamedTuple):
    """What records are read as."""

    of_tokens: bool
    problem: Problem
    labels: list[str]


def read_labelled_texts(path: str, reading: LabelSpec) -> list[LabelledText]:
    """All records of the files that a path, folder or glob names; DataError naming file and line of a bad one."""
    found = [_labelled(record, reading, place) for record, place in _records(path)]
    if not found:
        raise DataError(f"{path} holds no text with a label")
    return found


def find_labels(path: str, *, of_tokens: bool, problem: Problem) -> list[str]:
    """The classes that the files name, sorted: what `classification.labels` may be set to."""
    found: set[str] = set()
    for record, _ in _records(path):
        value = record.get("labels" if of_tokens or problem == "multi-label" else "label")
        found |= {
            str(label)
            for label in (value if isinstance(value, list) else [value])
            if label is not None
        }
    return sorted(
        found, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label)
    )


def _records(path: str) -> Iterator[tuple[dict[str, Any], str]]:
    files = find_inputs([path]).files
    size = sum(file.stat().st_size for file in files)
    if size > MOST_BYTES:
        raise DataError(
            f"{path} holds {size / 1e9:.1f} GB, and every rank reads files with labels whole: {MOST_BYTES / 1e9:.1f} GB at most"
        )
    for block in read_blocks(files, field=None):
        if block.form == "file":
            raise DataError(f"{block.path} is plain text; labels come in JSONL or parquet")
        objects, problems = parse_objects(block)
        if problems:
            raise DataError(str(problems[0]))
        for number, record in objects:
            yield record, f"{block.path}, {block.form} {number}"


def _labelled(record: dict[str, Any], reading: LabelSpec, place: str) -> LabelledText:
    if reading.of_tokens:
        return _word_labels(record, reading, place)
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{place}: no text in the field "text"')
    return LabelledText(split_words(text), [_text_target(record, reading, place)])


def _text_target(record: dict[str, Any], reading: LabelSpec, place: str) -> int:
    name = "labels" if reading.problem == "multi-label" else "label"
    value = record.get(name)
    if value is None:
        raise DataError(f'{place}: the field "{name}" is missing')
    if reading.problem == "multi-label":
        if not isinstance(value, list):
            raise DataError(f'{place}: the field "labels" is not a list of classes')
        return encode_classes(_class(item, reading.labels, place) for item in value)
    if reading.problem == "single-label":
        return _class(value, reading.labels, place)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place}: the label {_short(value)} is not a number")
    return encode_value(float(value))


def _class(value: object, labels: list[str], place: str) -> int:
    """A class's number from its name, or from the number itself."""
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if str(value) in labels:
            return labels.index(str(value))
        if 0 <= value < len(labels):
            return value
        raise DataError(
            f"{place}: the label {value} is out of range; there are {len(labels)} classes, 0 to {len(labels) - 1}"
        )
    close = difflib.get_close_matches(str(value), labels, n=1)
    hint = (
        f"did you mean `{close[0]}`?"
        if close
        else f"known are {', '.join(labels[:20])}{' ...' if len(labels) > 20 else ''}"
    )
    raise DataError(f"{place}: the label {_short(value)} is none of classification.labels; {hint}")


def _word_labels(record: dict[str, Any], reading: LabelSpec, place: str) -> LabelledText:
    words, labels = record.get("tokens"), record.get("labels")
    if (
        not isinstance(words, list)
        or not words
        or not all(isinstance(word, str) and word.strip() for word in words)
    ):
        raise DataError(f'{place}: the field "tokens" is not a list of words')
    if not isinstance(labels, list):
        raise DataError(
            f'{place}: the field "labels" is missing, with a class for each of "tokens"'
        )
    if len(labels) != len(words):
        raise DataError(f"{place}: {len(words)} tokens have {len(labels)} labels")
    targets = [None if label is None else _class(label, reading.labels, place) for label in labels]
    return LabelledText([f"{word} " for word in words], targets)


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class EncodedText(NamedTuple):
    """Tokens, the label of each, and whether the text was longer."""

    tokens: list[int]
    labels: list[int]
    is_truncated: bool


def encode_text(
    text: LabelledText, tokenizer: Any, *, of_tokens: bool, length: int, padding: int
) -> EncodedText:
    """At most `length` tokens of a text, with its label where transformers looks for it."""
    made = tokenizer(
        "".join(text.words).rstrip() if of_tokens else "".join(text.words),
        return_offsets_mapping=of_tokens,
    )
    tokens = list(made["input_ids"])
    cut, kept = len(tokens) > length, tokens[:length]
    if of_tokens:
        return EncodedText(kept, first_token_labels(text, made["offset_mapping"])[:length], cut)
    labels = [IGNORE_INDEX] * len(kept)
    if kept:
        target = text.targets[0]
        assert target is not None
        labels[last_token_index(kept, padding)] = target
    return EncodedText(kept, labels, cut)


class ClassificationDataset:
    """Samples of labelled texts, each once an epoch in an order of its own.

    Attributes:
        samples_per_epoch: how many there are.
        num_truncated: how many were longer than a sequence, of all that was tokenised so far.
        limit: the position from which on samples are padding alone, so that the last step of a run is filled.
    """

    def __init__(
        self,
        texts: Sequence[LabelledText],
        tokenizer: Any,
        *,
        of_tokens: bool,
        sequence_length: int,
        padding: int,
        seed: int,
        augmentation: Augment = "none",
        augment_share: float = 0.0,
    ) -> None:
        self._texts, self._tokenizer, self._of_tokens, self._seed = (
            texts,
            tokenizer,
            of_tokens,
            seed,
        )
        self._padding, self._how, self._share = padding, augmentation, augment_share
        self.sequence_length, self.samples_per_epoch = sequence_length, len(texts)
        self.limit: int | None = None
        self._order = lru_cache(maxsize=2)(
            lambda epoch: Shuffle(self.samples_per_epoch, key=("labelled", seed, epoch))
        )
        self.num_truncated = 0
        self._encoded = [self._encode(text) for text in texts] if augmentation == "none" else None

    def fetch(self, position: int) -> Sample:
        """Return the sample at `position`."""
        if self.limit is not None and position >= self.limit:
            return self._sample(EncodedText([], [], False))
        epoch, place = divmod(position, self.samples_per_epoch)
        index = self._order(epoch)(place)
        if self._encoded is not None:
            return self._sample(self._encoded[index])
        return self._sample(self._encode(self._varied(self._texts[index], position)))

    def _varied(self, text: LabelledText, position: int) -> LabelledText:
        """The text as it is seen at this position; words keep their labels."""
        key = keyed_integers("augment", self._seed, position)
        if self._of_tokens:
            other = mask_word(self._tokenizer)
            pairs = list(zip(text.words, text.targets, strict=True))
            masked = None if other is None else [(f"{other} ", target) for _, target in pairs]
            words, targets = zip(
                *augment(pairs, self._how, share=self._share, key=key, masked=masked), strict=True
            )
            return LabelledText(list(words), list(targets))
        return text._replace(
            words=augment(
                text.words, self._how, share=self._share, key=key, masked=self._masked(text.words)
            )
        )

    def _masked(self, words: list[str]) -> list[str] | None:
        other = mask_word(self._tokenizer)
        return None if other is None else [word.replace(word.strip(), other) for word in words]

    def _encode(self, text: LabelledText) -> EncodedText:
        encoded = encode_text(
            text,
            self._tokenizer,
            of_tokens=self._of_tokens,
            length=self.sequence_length,
            padding=self._padding,
        )
        self.num_truncated += encoded.is_truncated
        return encoded

    def _sample(self, encoded: EncodedText) -> Sample:
        length = self.sequence_length
        row, marks = (
            np.full(length, self._padding, dtype=np.int64),
            np.full(length, IGNORE_INDEX, dtype=np.int64),
        )
        row[: len(encoded.tokens)] = encoded.tokens
        marks[: len(encoded.labels)] = encoded.labels
        return Sample(
            row, marks, np.arange(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
        )


def last_token_index(tokens: Sequence[int], padding: int) -> int:
    """Where a classifier of transformers looks: the last token that is not padding, the first where all are."""
    return max((place for place, token in enumerate(tokens) if token != padding), default=0)


def first_token_labels(text: LabelledText, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The label of each token: a word's stands at the first token that reaches into it and into no word before, all others have none."""
    labels = [IGNORE_INDEX] * len(offsets)
    start, token = 0, 0
    for word, target in zip(text.words, text.targets, strict=True):
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        stop = start + len(word.rstrip())
        if token < len(offsets) and offsets[token][0] < stop:
            labels[token] = IGNORE_INDEX if target is None else target
            token += 1
        start += len(word)
    return labels
