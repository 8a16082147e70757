"""Labelled texts from JSONL or parquet, and their samples as a function of (seed, position).

| task                         | a record                                                  |
|------------------------------|-----------------------------------------------------------|
| classification, single-label | `text`, `label`: the name or number of a class            |
| classification, multi-label  | `text`, `labels`: a list of them, which may be empty      |
| classification, regression   | `text`, `label`: a number                                 |
| token-classification         | `tokens`: words, `labels`: a class each; null has no loss |

A sample is one text, truncated or padded at its end. Its label is at the token that classifiers of
transformers read: the last that is not padding. Labels of words are at their first tokens. Every
rank reads the files into memory, which suits datasets that are small beside a model: MAX_BYTES at
most.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from megatrain.config.schema import Augment, Problem
from megatrain.data.gpt_dataset import IGNORE_INDEX, Float32, Sample
from megatrain.data.records import parse_objects
from megatrain.data.shuffle import Shuffle, keyed_integers
from megatrain.data.text_augmentation import augment, mask_word, split_words
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import DataError, truncate

MAX_BYTES = 1 << 30
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class LabelledText(NamedTuple):
    """A text and its labels.

    Attributes:
        words: each with the white space around it.
        labels: the class of each word (None has no loss), or of the text. It is [0] for
            multi-label and regression problems, whose values are in `targets`.
        targets: fp32 [labels]: 0 or 1 for each class, or the value of a regression.
    """

    words: list[str]
    labels: list[int | None]
    targets: Float32 | None = None


class LabelSpec(NamedTuple):
    """The format of labels: per token or per text, the problem type, the names of classes."""

    of_tokens: bool
    problem: Problem
    labels: list[str]

    @property
    def field(self) -> str:
        """The field of a record that contains its label or labels."""
        return "labels" if self.of_tokens or self.problem == "multi-label" else "label"


def read_labelled_texts(path: str, spec: LabelSpec) -> list[LabelledText]:
    """Returns all records of the files that a path, folder or glob names.

    Raises:
        DataError: the first record that is not valid, with file and line.
    """
    texts = [_labelled_text(record, spec, location) for record, location in _records(path)]
    if not texts:
        raise DataError(f"{path} contains no text with a label")
    return texts


def find_labels(path: str, *, of_tokens: bool, problem: Problem) -> list[str]:
    """Returns the sorted classes that the files name, the value for `classification.labels`."""
    field = LabelSpec(of_tokens, problem, []).field
    found: set[str] = set()
    for record, _ in _records(path):
        value = record.get(field)
        values = value if isinstance(value, list) else [value]
        found |= {str(label) for label in values if label is not None}
    return sorted(found, key=lambda label: (not label.isdigit(), _number(label), label))


def _number(label: str) -> int:
    return int(label) if label.isdigit() else 0


def _records(path: str) -> Iterator[tuple[dict[str, Any], str]]:
    files = find_inputs([path]).files
    size = sum(file.stat().st_size for file in files)
    if size > MAX_BYTES:
        raise DataError(
            f"{path} has {size / 1e9:.1f} GB; labelled files must have at most "
            f"{MAX_BYTES / 1e9:.1f} GB, because every rank reads them into memory"
        )
    for block in read_blocks(files, field=None):
        if block.form == "file":
            raise DataError(f"{block.path} is plain text; labels must be in JSONL or parquet")
        objects, problems = parse_objects(block)
        if problems:
            raise DataError(str(problems[0]))
        for number, record in objects:
            yield record, f"{block.path}, {block.form} {number}"


def _labelled_text(record: dict[str, Any], spec: LabelSpec, location: str) -> LabelledText:
    if spec.of_tokens:
        return _labelled_words(record, spec, location)
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{location}: no text in the field "text"')
    words, target = split_words(text), _text_target(record, spec, location)
    if isinstance(target, int):
        return LabelledText(words, [target])
    return LabelledText(words, [0], target)


def _text_target(record: dict[str, Any], spec: LabelSpec, location: str) -> int | Float32:
    """Returns a class, or the values of a multi-label or regression problem."""
    value = record.get(spec.field)
    if value is None:
        raise DataError(f'{location}: the field "{spec.field}" is missing')
    if spec.problem == "multi-label":
        if not isinstance(value, list):
            raise DataError(f'{location}: the field "labels" is not a list of classes')
        target = np.zeros(len(spec.labels), dtype=np.float32)
        target[[_class(item, spec.labels, location) for item in value]] = 1.0
        return target
    if spec.problem == "single-label":
        return _class(value, spec.labels, location)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and abs(value) <= _MAX_FLOAT32):
        raise DataError(f"{location}: the label {_json(value)} is not a number")
    return np.array([value], dtype=np.float32)


def _class(value: object, labels: list[str], location: str) -> int:
    """Returns the number of a class that is given by its name or by its number."""
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if str(value) in labels:
            return labels.index(str(value))
        if 0 <= value < len(labels):
            return value
        raise DataError(
            f"{location}: the label {value} is out of range; "
            f"there are {len(labels)} classes, 0 to {len(labels) - 1}"
        )
    close = difflib.get_close_matches(str(value), labels, n=1)
    if close:
        hint = f"did you mean `{close[0]}`?"
    else:
        hint = f"supported: {', '.join(labels[:20])}{' ...' if len(labels) > 20 else ''}"
    raise DataError(f"{location}: the label {_json(value)} is not in classification.labels; {hint}")


def _labelled_words(record: dict[str, Any], spec: LabelSpec, location: str) -> LabelledText:
    words, labels = record.get("tokens"), record.get("labels")
    if not (words and isinstance(words, list) and all(map(_is_word, words))):
        raise DataError(f'{location}: the field "tokens" is not a list of words')
    if not isinstance(labels, list):
        raise DataError(
            f'{location}: the field "labels" is missing, with a class for each of "tokens"'
        )
    if len(labels) != len(words):
        raise DataError(f"{location}: {len(words)} tokens have {len(labels)} labels")
    classes = [None if label is None else _class(label, spec.labels, location) for label in labels]
    return LabelledText([f"{word} " for word in words], classes)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _json(value: object) -> str:
    return truncate(json.dumps(value, default=str))


class EncodedText(NamedTuple):
    """The tokens of a text, the label of each, and the targets of the text."""

    tokens: list[int]
    labels: list[int]
    is_truncated: bool
    targets: Float32 | None = None


def encode_text(
    text: LabelledText, tokenizer: Any, *, of_tokens: bool, length: int, padding: int
) -> EncodedText:
    """Returns at most `length` tokens of a text, with labels where transformers reads them."""
    joined = "".join(text.words)
    encoding = tokenizer(joined.rstrip() if of_tokens else joined, return_offsets_mapping=of_tokens)
    tokens = list(encoding["input_ids"])
    is_truncated, tokens = len(tokens) > length, tokens[:length]
    if of_tokens:
        labels = first_token_labels(text, encoding["offset_mapping"])[:length]
        return EncodedText(tokens, labels, is_truncated)
    labels = [IGNORE_INDEX] * len(tokens)
    if tokens:
        label = text.labels[0]
        assert label is not None
        labels[last_token_index(tokens, padding)] = label
    return EncodedText(tokens, labels, is_truncated, text.targets)


class ClassificationDataset:
    """Samples of labelled texts; each epoch has all of them in its own order.

    Attributes:
        samples_per_epoch: the number of texts.
        num_truncated: the number of texts tokenized so far that were longer than a sequence.
        limit: the position from which samples are padding only; None for no limit.
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
        self._texts = texts
        self._tokenizer = tokenizer
        self._of_tokens = of_tokens
        self._seed = seed
        self._padding = padding
        self._augmentation = augmentation
        self._share = augment_share
        self.sequence_length = sequence_length
        self.samples_per_epoch = len(texts)
        self.limit: int | None = None
        self._order = lru_cache(maxsize=2)(self._make_order)
        first = texts[0].targets if texts else None
        self._no_targets = None if first is None else np.zeros_like(first)
        self.num_truncated = 0
        self._encoded = [self._encode(text) for text in texts] if augmentation == "none" else None

    def fetch(self, position: int) -> Sample:
        """Returns the sample at `position`."""
        if self.limit is not None and position >= self.limit:
            return self._make_sample(EncodedText([], [], False, self._no_targets))
        epoch, index = divmod(position, self.samples_per_epoch)
        index = self._order(epoch)(index)
        if self._encoded is not None:
            return self._make_sample(self._encoded[index])
        return self._make_sample(self._encode(self._augment(self._texts[index], position)))

    def _make_order(self, epoch: int) -> Shuffle:
        return Shuffle(self.samples_per_epoch, key=("labelled", self._seed, epoch))

    def _augment(self, text: LabelledText, position: int) -> LabelledText:
        """Returns the text as augmented at this position; words keep their labels."""
        key = keyed_integers("augment", self._seed, position)
        mask = mask_word(self._tokenizer)
        if not self._of_tokens:
            masked = None
            if mask is not None:
                masked = [word.replace(word.strip(), mask) for word in text.words]
            words = augment(
                text.words, self._augmentation, share=self._share, key=key, masked=masked
            )
            return text._replace(words=words)
        pairs = list(zip(text.words, text.labels, strict=True))
        masked_pairs = None if mask is None else [(f"{mask} ", label) for _, label in pairs]
        augmented = augment(
            pairs, self._augmentation, share=self._share, key=key, masked=masked_pairs
        )
        return LabelledText([word for word, _ in augmented], [label for _, label in augmented])

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

    def _make_sample(self, encoded: EncodedText) -> Sample:
        length = self.sequence_length
        tokens = np.full(length, self._padding, dtype=np.int64)
        labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
        tokens[: len(encoded.tokens)] = encoded.tokens
        labels[: len(encoded.labels)] = encoded.labels
        positions, documents = np.arange(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
        return Sample(tokens, labels, positions, documents, encoded.targets)


def last_token_index(tokens: Sequence[int], padding: int) -> int:
    """Returns the index of the last token that is not padding, or 0.

    Classifiers of transformers read their prediction there.
    """
    return max((index for index, token in enumerate(tokens) if token != padding), default=0)


def first_token_labels(text: LabelledText, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the label of each token.

    Each word has its label at the first token that covers a part of it and of no earlier word.
    """
    labels = [IGNORE_INDEX] * len(offsets)
    start, token = 0, 0
    for word, label in zip(text.words, text.labels, strict=True):
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        stop = start + len(word.rstrip())
        if token < len(offsets) and offsets[token][0] < stop:
            labels[token] = IGNORE_INDEX if label is None else label
            token += 1
        start += len(word)
    return labels
