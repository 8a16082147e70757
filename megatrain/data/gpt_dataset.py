"""Training samples from documents, as a function of (seed, position) alone.

1. `indexed_dataset.py` maps the files: one stream of tokens that is cut into documents. A
   `GPTDataset` reads documents [first, last).
2. Epoch e cuts the stream, closed to a ring, every `sequence_length` tokens from an offset that
   depends on (seed, e):

       tokens      . . . . . . . . . . . . .      13 tokens, sequence_length 4, offset 2
       sample 0        [a b c d e]                4 + 1 tokens: inputs a b c d, labels b c d e
       sample 1                [e . . . .]        shares one token with its neighbour
       sample 2    . . .]              [. .       the last one continues in the first document

   The ring gives every epoch the same number of samples, num_tokens // sequence_length, for any
   offset. Epoch and index of a position are therefore one division. The tokens that do not fill a
   sample are left out; they differ from epoch to epoch.
3. `shuffle.py` orders the samples of the epoch, keyed by (seed, e).
4. `blend.py` distributes positions over several sources by weight.
5. `dataloader.py` distributes positions to steps, microbatches and data ranks.

No index is built, stored or shared between ranks. A resume needs the step number only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatrain.data.blend import Blend
from megatrain.data.indexed_dataset import IndexedDataset, Tokens
from megatrain.data.shuffle import Shuffle, keyed_integers
from megatrain.data.split import Part, split_documents
from megatrain.errors import ConfigError, DataError

IGNORE_INDEX = -100
"""The label without a loss; torch's default `ignore_index` of cross-entropy."""

Int64 = np.ndarray[Any, np.dtype[np.int64]]
Float32 = np.ndarray[Any, np.dtype[np.float32]]
Paths = str | Sequence[Mapping[str, Any]]


class Sample(NamedTuple):
    """One sequence of S tokens.

    Without a document mask positions are 0..S-1 and documents all 0. With it, positions restart at
    every document. A label that is the first token of the next document is then IGNORE_INDEX,
    because no visible token could predict it. The end-of-document token keeps its loss.

    Attributes:
        tokens: int64[S].
        labels: int64[S], the next token or IGNORE_INDEX.
        positions: int64[S], for the position embedding.
        documents: int64[S], 0 for the first document in the sample, then 1, 2, ...; attention
            stays within a document.
        targets: float32[labels], of a text with several classes or with a value.
    """

    tokens: Int64
    labels: Int64
    positions: Int64
    documents: Int64
    targets: Float32 | None = None


class Samples(Protocol):
    """An endless sequence of samples."""

    def fetch(self, position: int) -> Sample:
        """Returns the sample at `position`, any integer from 0."""


class DataSection(Protocol):
    """The settings that this module reads."""

    @property
    def train(self) -> Paths | None: ...
    @property
    def valid(self) -> Paths | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def document_mask(self) -> bool: ...


class _Epoch(NamedTuple):
    offset: int
    order: Shuffle


class GPTDataset:
    """The samples of documents [first, last) of one dataset.

    Raises:
        DataError: the documents have too few tokens for one sample, or the tokens are not integers.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        *,
        sequence_length: int,
        seed: int,
        vocab_size: int,
        first: int = 0,
        last: int | None = None,
        document_mask: bool = False,
    ) -> None:
        last = dataset.num_documents if last is None else last
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.seed = seed
        self.vocab_size = vocab_size
        self.document_mask = document_mask
        self._start = dataset.document_start(first)
        self.num_tokens = dataset.document_start(last) - self._start
        self._check(first, last)
        self.samples_per_epoch = self.num_tokens // sequence_length
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        # Negative ids are huge as unsigned integers: one comparison checks both ends.
        self._unsigned = np.dtype(f"u{dataset.dtype.itemsize}")
        self._can_exceed = np.iinfo(self._unsigned).max >= vocab_size
        self._plain_positions = _read_only(np.arange(sequence_length, dtype=np.int64))
        self._one_document = _read_only(np.zeros(sequence_length, dtype=np.int64))

    def fetch(self, position: int) -> Sample:
        """Returns the sample at `position`.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        start = self.start(position)
        window = self._window(start)
        if self.document_mask:
            return _mask_documents(window, boundaries=self._boundaries(start))
        return Sample(window[:-1], window[1:], self._plain_positions, self._one_document)

    def start(self, position: int) -> int:
        """Returns the first token of the sample at `position`, counted from document `first`."""
        number, index = divmod(position, self.samples_per_epoch)
        epoch = self._epoch(number)
        return (epoch.offset + epoch.order(index) * self.sequence_length) % self.num_tokens

    def origin(self, position: int) -> tuple[str, list[int]]:
        """Returns the prefix of the dataset and the documents of the sample at `position`."""
        documents: list[int] = []
        for start, length in self._ranges(self.start(position)):
            first = self.dataset.document_at(start)
            documents += range(first, self.dataset.document_at(start + length - 1) + 1)
        return str(self.dataset.bin_path.with_suffix("")), documents

    def _check(self, first: int, last: int) -> None:
        path, dtype = self.dataset.bin_path, self.dataset.dtype
        if dtype.kind not in "iu":
            raise DataError(f"{path} contains {dtype}, but token ids must be integers")
        if self.num_tokens < self.sequence_length + 1:
            is_part = last - first < self.dataset.num_documents
            part = f", documents {first} to {last - 1}," if is_part else ""
            raise DataError(
                f"{path}{part} has {self.num_tokens} tokens, but one sample takes "
                f"data.sequence_length={self.sequence_length} tokens and 1 for the last label"
            )

    def _make_epoch(self, number: int) -> _Epoch:
        offset = keyed_integers("offset", self.seed, number)[0] % self.sequence_length
        return _Epoch(offset, Shuffle(self.samples_per_epoch, key=("samples", self.seed, number)))

    def _ranges(self, start: int) -> list[tuple[int, int]]:
        """Returns the one or two ranges (start, length) of the stream that make a sample."""
        length = self.sequence_length + 1
        until_end = min(length, self.num_tokens - start)
        ranges = [(self._start + start, until_end)]
        return ranges if until_end == length else [*ranges, (self._start, length - until_end)]

    def _window(self, start: int) -> Int64:
        window = np.empty(self.sequence_length + 1, dtype=np.int64)
        filled = 0
        for range_start, length in self._ranges(start):
            tokens = self.dataset.tokens(range_start, length)
            if self._can_exceed and int(tokens.view(self._unsigned).max()) >= self.vocab_size:
                raise self._outside_vocabulary(tokens, range_start)
            window[filled : filled + length] = tokens
            filled += length
        return window

    def _boundaries(self, start: int) -> Int64:
        """Returns the indices above 0 where a document starts in the window: int64[any number]."""
        found: list[Int64] = []
        filled = 0
        for range_start, length in self._ranges(start):
            if filled:  # the ring continues with another document
                found.append(np.array([filled], dtype=np.int64))
            starts = self.dataset.starts_within(range_start, range_start + length)
            found.append(starts - range_start + filled)
            filled += length
        return np.concatenate(found) if len(found) > 1 else found[0]

    def _outside_vocabulary(self, tokens: Tokens, start: int) -> DataError:
        index = int((tokens.view(self._unsigned) >= self.vocab_size).argmax())
        return DataError(
            f"{self.dataset.bin_path}: document {self.dataset.document_at(start + index)} contains "
            f"token id {int(tokens[index])}, outside the vocabulary of {self.vocab_size}; "
            "the file was written with another tokenizer"
        )


def _mask_documents(window: Int64, *, boundaries: Int64) -> Sample:
    """Returns the sample of window[S + 1]; documents start at 0 and at `boundaries`, in [1, S]."""
    length = len(window) - 1
    labels = window[1:].copy()
    labels[boundaries - 1] = IGNORE_INDEX
    is_start = np.zeros(length + 1, dtype=np.bool_)
    is_start[boundaries] = True
    documents = np.cumsum(is_start[:-1], dtype=np.int64)
    is_start[0] = True
    positions = np.arange(length, dtype=np.int64) - np.flatnonzero(is_start)[documents]
    return Sample(window[:-1], labels, positions, documents)


def _read_only(array: Int64) -> Int64:
    array.setflags(write=False)
    return array


class BlendedDataset:
    """Several sources mixed by weight.

    Args:
        sources: the datasets.
        weights: one positive number per source.
        seed: the seed of the mix.
        each: consecutive positions of a source that stay together, such as 2 for pairs.
    """

    def __init__(
        self, sources: Sequence[Samples], *, weights: Sequence[float], seed: int, each: int = 1
    ) -> None:
        assert len(sources) == len(weights) > 0
        self._sources = sources
        self._each = each
        self._blend = Blend(weights, seed=seed)

    def fetch(self, position: int) -> Sample:
        """Returns the sample at `position` of the blend."""
        source, position = self._locate(position)
        return source.fetch(position)

    @property
    def origin(self) -> Callable[[int], tuple[str, list[int]]] | None:
        """The function `origin` of the sources; None if one of them has none."""
        if not all(hasattr(source, "origin") for source in self._sources):
            return None
        return self._origin

    def _origin(self, position: int) -> tuple[str, list[int]]:
        source, position = self._locate(position)
        return source.origin(position)  # type: ignore[no-any-return, attr-defined]

    def _locate(self, position: int) -> tuple[Samples, int]:
        group, offset = divmod(position, self._each)
        index = self._blend.locate(group)
        return self._sources[index.source], index.position * self._each + offset


def open_dataset(
    data: DataSection, *, part: Part, sequence_length: int, seed: int, vocab_size: int
) -> Samples:
    """Opens the training or validation data of a run.

    Validation data are `data.valid`, or the second part of `data.split` of `data.train`.

    Raises:
        ConfigError: settings are missing or invalid.
        DataError: a file is missing, damaged or too short.
    """
    paths, split = select_paths(data, part)
    blend = parse_blend(paths, setting=f"data.{part if split is None else 'train'}")
    weights = [weight for _, weight in blend]
    Blend(weights, seed=seed)  # checks the weights before any file is opened
    sources: list[Samples] = []
    for number, (path, _) in enumerate(blend):
        dataset = IndexedDataset(path)
        first, last = 0, dataset.num_documents
        if split is not None:
            first, last = split_documents(last, split=split, part=part)
        source = GPTDataset(
            dataset,
            sequence_length=sequence_length,
            # Sources of equal size must not have the same order.
            seed=keyed_integers("source", seed, part, number)[0],
            vocab_size=vocab_size,
            first=first,
            last=last,
            document_mask=data.document_mask,
        )
        sources.append(source)
    return sources[0] if len(sources) == 1 else BlendedDataset(sources, weights=weights, seed=seed)


def select_paths(data: DataSection, part: Part) -> tuple[Paths, str | None]:
    """Returns the paths that `part` is read from, and the split to apply to them."""
    if data.valid is not None and data.split is not None:
        raise ConfigError(
            "data.split", data.split, "cannot be used with data.valid", fix={"data.split": None}
        )
    if data.train is None:
        raise ConfigError("data.train", None, "names no data", _PREFIX_HINT)
    if part == "train" or data.split is not None:
        return data.train, data.split
    if data.valid is None:
        raise ConfigError(
            "data.valid",
            None,
            "names no data",
            "set it, or use a part of data.train",
            fix={"data.split": "98,2"},
        )
    return data.valid, None


_PREFIX_HINT = "give the prefix of a .bin and .idx file"


def parse_blend(paths: Paths, *, setting: str) -> list[tuple[str, float]]:
    """Returns (prefix, weight) of each source."""
    if isinstance(paths, str):
        return [(paths, 1.0)]
    for entry in paths:
        if not isinstance(entry, Mapping) or set(entry) != {"path", "weight"}:
            raise ConfigError(
                setting,
                entry,
                "must have a path and a weight",
                "write - {path: PREFIX, weight: 0.3}",
            )
    if not paths:
        raise ConfigError(setting, [], "names no data", _PREFIX_HINT)
    return [(str(entry["path"]), entry["weight"]) for entry in paths]
