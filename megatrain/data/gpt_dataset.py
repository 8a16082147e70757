"""Documents to training samples, as a function of (seed, position) and nothing else.

1. `indexed.py` maps the files: one stream of tokens cut into documents. A `SampleSource` sees documents [first, last).
2. Epoch e cuts their stream, bent into a ring, every `sequence_length` tokens from an offset that (seed, e) picks:

       tokens      . . . . . . . . . . . . .      13 tokens, sequence_length 4, offset 2
       sample 0        [a b c d e]                4 + 1 tokens: inputs a b c d, labels b c d e
       sample 1                [e . . . .]        shares one token with its neighbour
       sample 2    . . .]              [. .       the last one runs on into the first document

   The ring gives every epoch the same number of samples whatever its offset, num_tokens // sequence_length, so that
   epoch and index of a position are one division; less than one sample's tokens go unused an epoch, others each time.
3. `permutation.py` orders the samples of the epoch, keyed by (seed, e).
4. `blend.py` spreads positions over several sources by weight.
5. `loader.py` deals positions to steps, microbatches and data ranks.

Nothing is built, stored or shared between ranks, and a resumed run needs only its step number.
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

IGNORE_INDEX = -100  # the label that cross entropy skips, torch's own default

Int64 = np.ndarray[Any, np.dtype[np.int64]]
Paths = str | Sequence[Mapping[str, Any]]


class Sample(NamedTuple):
    """One sequence of S tokens.

    Without a document mask positions are 0..S-1 and documents all 0. With it, positions restart at every document,
    and a label that is the first token of the next document is IGNORE_INDEX: nothing the model sees could predict it.
    The end-of-document token is still learnt, as the label of a document's last token but one.
    """

    tokens: Int64  # [S]
    labels: Int64  # [S], the next token or IGNORE_INDEX
    positions: Int64  # [S], for the position embedding
    documents: Int64  # [S], 0 for the first document in the sample, then 1, ...: attention stays within one


class Samples(Protocol):
    """An endless sequence of samples."""

    def fetch(self, position: int) -> Sample:
        """Return the sample at `position`, from 0 on without end."""


class DataSection(Protocol):
    """The settings this file reads."""

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
    """The samples of documents [first, last) of one data set."""

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
        """Raise DataError for data without one whole sample, or of numbers that are no token ids."""
        self.dataset, self.sequence_length, self.seed, self.vocab_size = (
            dataset,
            sequence_length,
            seed,
            vocab_size,
        )
        self.document_mask = document_mask
        last = dataset.num_documents if last is None else last
        self._start = dataset.document_start(first)
        self.num_tokens = dataset.document_start(last) - self._start
        if dataset.dtype.kind not in "iu":
            raise DataError(
                f"{dataset.bin_path} holds {dataset.dtype}, but token ids must be integers"
            )
        if self.num_tokens < sequence_length + 1:
            part = (
                ""
                if last - first == dataset.num_documents
                else f", documents {first} to {last - 1},"
            )
            raise DataError(
                f"{dataset.bin_path}{part} has {self.num_tokens} tokens to draw from, but one sample takes "
                f"data.sequence_length={sequence_length} tokens and 1 for the last label"
            )
        self.samples_per_epoch = self.num_tokens // sequence_length
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        # An id below zero becomes a huge one here, so that one maximum checks both ends.
        self._unsigned = np.dtype(f"u{dataset.dtype.itemsize}")
        self._can_exceed = np.iinfo(self._unsigned).max >= vocab_size
        self._plain_positions = _frozen(np.arange(sequence_length, dtype=np.int64))
        self._one_document = _frozen(np.zeros(sequence_length, dtype=np.int64))

    def fetch(self, position: int) -> Sample:
        """Return the sample at `position`; raise DataError for a token outside the vocabulary."""
        start = self.start(position)
        window = self._window(start)
        if self.document_mask:
            return _masked(window, boundaries=self._boundaries(start))
        return Sample(window[:-1], window[1:], self._plain_positions, self._one_document)

    def start(self, position: int) -> int:
        """Return the first token of the sample at `position`, counted from the first document of this source."""
        number, index = divmod(position, self.samples_per_epoch)
        epoch = self._epoch(number)
        return (epoch.offset + epoch.order(index) * self.sequence_length) % self.num_tokens

    def origin(self, position: int) -> tuple[str, list[int]]:
        """Return the data set and the documents that the sample at `position` has tokens of."""
        documents: list[int] = []
        for start, length in self._pieces(self.start(position)):
            documents += range(
                self.dataset.document_at(start), self.dataset.document_at(start + length - 1) + 1
            )
        return str(self.dataset.bin_path.with_suffix("")), documents

    def _make_epoch(self, number: int) -> _Epoch:
        offset = keyed_integers("offset", self.seed, number)[0] % self.sequence_length
        return _Epoch(offset, Shuffle(self.samples_per_epoch, key=("samples", self.seed, number)))

    def _pieces(self, start: int) -> list[tuple[int, int]]:
        """Return the one or two stretches (start, length) of the file's stream that make the sample at `start`."""
        length = self.sequence_length + 1
        until_end = min(length, self.num_tokens - start)
        pieces = [(self._start + start, until_end)]
        return pieces if until_end == length else [*pieces, (self._start, length - until_end)]

    def _window(self, start: int) -> Int64:
        window = np.empty(self.sequence_length + 1, dtype=np.int64)
        filled = 0
        for piece_start, length in self._pieces(start):
            tokens = self.dataset.tokens(piece_start, length)
            if self._can_exceed and int(tokens.view(self._unsigned).max()) >= self.vocab_size:
                raise self._outside_vocabulary(tokens, piece_start)
            window[filled : filled + length] = tokens
            filled += length
        return window

    def _boundaries(self, start: int) -> Int64:
        """Return where in the window a new document starts, without its first token: int64[documents - 1]."""
        found: list[Int64] = []
        filled = 0
        for piece_start, length in self._pieces(start):
            if filled:  # the ring's seam
                found.append(np.array([filled], dtype=np.int64))
            found.append(
                self.dataset.starts_within(piece_start, piece_start + length) - piece_start + filled
            )
            filled += length
        return np.concatenate(found) if len(found) > 1 else found[0]

    def _outside_vocabulary(self, tokens: Tokens, start: int) -> DataError:
        at = int((tokens.view(self._unsigned) >= self.vocab_size).argmax())
        return DataError(
            f"{self.dataset.bin_path}: document {self.dataset.document_at(start + at)} holds token id "
            f"{int(tokens[at])}, outside the vocabulary of {self.vocab_size}; it was written with another tokenizer"
        )


def _masked(window: Int64, *, boundaries: Int64) -> Sample:
    """Return the sample of window[S + 1] with a document starting at each of `boundaries`, each in [1, S]."""
    length = len(window) - 1
    labels = window[1:].copy()
    labels[boundaries - 1] = IGNORE_INDEX
    is_start = np.zeros(length + 1, dtype=np.bool_)
    is_start[boundaries] = True
    documents = np.cumsum(is_start[:-1], dtype=np.int64)
    is_start[0] = True  # of what the sample shows of its first document
    positions = np.arange(length, dtype=np.int64) - np.flatnonzero(is_start)[documents]
    return Sample(window[:-1], labels, positions, documents)


def _frozen(array: Int64) -> Int64:
    array.setflags(write=False)
    return array


class BlendedDataset:
    """Several sources mixed by weight; `each` neighbours in a source stay together."""

    def __init__(
        self, sources: Sequence[Samples], *, weights: Sequence[float], seed: int, each: int = 1
    ) -> None:
        assert len(sources) == len(weights) > 0
        self._sources, self._each = sources, each
        self._blend = Blend(weights, seed=seed)

    def fetch(self, position: int) -> Sample:
        """Return the sample at `position`, from the source that the blend gives it."""
        return self._find(position, lambda samples, found: samples.fetch(found))

    @property
    def origin(self) -> Callable[[int], tuple[str, list[int]]] | None:
        """As of a single source, where all of them can say."""
        if not all(hasattr(source, "origin") for source in self._sources):
            return None
        return lambda position: self._find(position, lambda samples, found: samples.origin(found))

    def _find(self, position: int, what: Callable[[Any, int], Any]) -> Any:
        first, within = divmod(position, self._each)
        place = self._blend.place(first)
        return what(self._sources[place.source], place.position * self._each + within)


def open_dataset(
    data: DataSection, *, part: Part, sequence_length: int, seed: int, vocab_size: int
) -> Samples:
    """Open the training or validation data of a run.

    Validation data are `data.valid`, or the second part of `data.split` of `data.train`. Raises ConfigError for
    settings that cannot work and DataError for files that cannot.
    """
    paths, split = select_paths(data, part)
    blend = parse_blend(paths, setting=f"data.{part if split is None else 'train'}")
    weights = [weight for _, weight in blend]
    Blend(weights, seed=seed)  # settings are checked before any file is opened
    sources: list[Samples] = []
    for number, (path, _) in enumerate(blend):
        dataset = IndexedDataset(path)
        first, last = 0, dataset.num_documents
        if split is not None:
            first, last = split_documents(last, split=split, part=part)
        source = GPTDataset(
            dataset,
            sequence_length=sequence_length,
            seed=_source_seed(seed, part, number),
            vocab_size=vocab_size,
            first=first,
            last=last,
            document_mask=data.document_mask,
        )
        sources.append(source)
    return sources[0] if len(sources) == 1 else BlendedDataset(sources, weights=weights, seed=seed)


def select_paths(data: DataSection, part: Part) -> tuple[Paths, str | None]:
    """Return the data one part is read from, and the split to apply to them."""
    if data.valid is not None and data.split is not None:
        raise ConfigError(
            "data.split", data.split, "cannot be used with data.valid", "leave out one of the two"
        )
    if data.train is None:
        raise ConfigError(
            "data.train", None, "names no data", "give the prefix of a .bin and .idx file"
        )
    if part == "train" or data.split is not None:
        return data.train, data.split
    if data.valid is None:
        raise ConfigError(
            "data.valid",
            None,
            "names no data",
            'set it, or data.split="98,2" to use part of data.train',
        )
    return data.valid, None


def parse_blend(paths: Paths, *, setting: str) -> list[tuple[str, float]]:
    """Return (prefix, weight) of each source."""
    if isinstance(paths, str):
        return [(paths, 1.0)]
    blend = []
    for entry in paths:
        if not isinstance(entry, Mapping) or set(entry) != {"path", "weight"}:
            raise ConfigError(
                setting,
                entry,
                "must have a path and a weight",
                "write - {path: PREFIX, weight: 0.3}",
            )
        blend.append((str(entry["path"]), entry["weight"]))
    if not blend:
        raise ConfigError(setting, [], "names no data", "give the prefix of a .bin and .idx file")
    return blend


def _source_seed(seed: int, part: Part, number: int) -> int:
    # Two sources of the same size must not be walked in the same order.
    return keyed_integers("source", seed, part, number)[0]
