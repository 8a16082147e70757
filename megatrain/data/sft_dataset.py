"""Training samples from prepared chats, as a function of (seed, position).

A sequence contains one chat, or several if they are packed. A chat of T tokens takes T - 1 places:

    tokens       a b c d   p q   0 0      8 places: chats a b c d E and p q E, and padding
    labels       . c d E   q E   . .      loss on c d E and q E; the rest is IGNORE_INDEX
    positions    0 1 2 3   0 1   0 1
    documents    0 0 0 0   1 1   2 2      attention stays within one

A chat in its own sequence is followed by padding, which no earlier token attends to. Positions
continue and the sequence is one document, as in pretraining without a document mask.

Each epoch has all sequences in its own order. From position `limit` on, sequences contain padding
only. The last step of a run is filled with them, so that no chat is repeated.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from megatrain.data.gpt_dataset import IGNORE_INDEX, Sample
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.packing import one_per_sequence, pack
from megatrain.data.shuffle import Shuffle

Int64 = np.ndarray[Any, np.dtype[np.int64]]


def encode_loss_mask(tokens: Int64, loss_mask: np.ndarray[Any, np.dtype[np.bool_]]) -> Int64:
    """Returns tokens with their loss mask in the lowest bit, the format of prepared files."""
    return tokens << 1 | loss_mask


class SFTDataset:
    """The sequences of chats [first, last) of a prepared dataset.

    Attributes:
        num_chats: the number of chats.
        samples_per_epoch: the number of sequences.
        fill_ratio: the share of places that are not padding.
        limit: the position from which samples are padding only; None for no limit.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        *,
        sequence_length: int,
        packing: bool,
        seed: int,
        padding: int,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._first = first
        self._seed = seed
        self._padding = padding
        self._packing = packing
        self.sequence_length = sequence_length
        lengths = np.diff(dataset.document_offsets(first, last)) - 1
        self._sequences = (
            pack(lengths, capacity=sequence_length, seed=seed)
            if packing
            else one_per_sequence(len(lengths))
        )
        self.num_chats = len(lengths)
        self.samples_per_epoch = len(self._sequences.starts) - 1
        self.fill_ratio = float(lengths.sum() / (self.samples_per_epoch * sequence_length))
        self.limit: int | None = None
        self._order = lru_cache(maxsize=2)(self._make_order)

    def fetch(self, position: int) -> Sample:
        """Returns the sequence at `position`."""
        if self.limit is not None and position >= self.limit:
            return self._make_sample([])
        epoch, index = divmod(position, self.samples_per_epoch)
        sequence = self._order(epoch)(index)
        start, stop = self._sequences.starts[sequence : sequence + 2]
        chats = self._sequences.order[start:stop]
        return self._make_sample([self.chat(int(number)) for number in chats])

    def chat(self, number: int) -> Int64:
        """Returns the tokens of a chat with their loss mask in the lowest bit."""
        return self._dataset.document(self._first + number).astype(np.int64)

    def _make_order(self, epoch: int) -> Shuffle:
        return Shuffle(self.samples_per_epoch, key=("chats", self._seed, epoch))

    def _make_sample(self, chats: list[Int64]) -> Sample:
        length = self.sequence_length
        tokens = np.full(length, self._padding, dtype=np.int64)
        labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
        positions, documents = np.arange(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
        start = 0
        for chat in chats:
            places = slice(start, start + len(chat) - 1)
            tokens[places] = chat[:-1] >> 1
            labels[places] = np.where(chat[1:] & 1, chat[1:] >> 1, IGNORE_INDEX)
            start = places.stop
            if self._packing:
                positions[start:] = np.arange(length - start)
                documents[start:] += 1
        return Sample(tokens, labels, positions, documents)
