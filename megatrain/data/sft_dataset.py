"""Prepared chats to training samples, as a function of (seed, position).

A sequence holds one chat, or several when they are packed; each of T tokens takes T - 1 places:

    tokens       a b c d   p q   0 0      8 places: chats a b c d E and p q E, and padding
    labels       . c d E   q E   . .      learnt are c d E and q E, the rest is IGNORE_INDEX
    positions    0 1 2 3   0 1   0 1
    documents    0 0 0 0   1 1   2 2      attention stays within one

A chat that has a sequence to itself is followed by padding, which no token before it sees: positions run on and the
sequence is one document, as in pretraining without a document mask.

Epochs go over all sequences, each in an order of its own. Beyond `limit` a sequence is padding alone, so that the last
step of a run is filled without any chat coming once more.
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


def encode_loss_mask(tokens: Int64, trained: np.ndarray[Any, np.dtype[np.bool_]]) -> Int64:
    """Tokens and whether each is learnt in one number, as the prepared files hold them."""
    return tokens << 1 | trained


class SFTDataset:
    """The sequences of chats [first, last) of a prepared data set."""

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
        self._dataset, self._first, self._seed, self._padding, self._packing = (
            dataset,
            first,
            seed,
            padding,
            packing,
        )
        self.sequence_length = sequence_length
        lengths = np.diff(dataset.document_offsets(first, last)) - 1
        self._sequences = (
            pack(lengths, capacity=sequence_length, seed=seed)
            if packing
            else one_per_sequence(len(lengths))
        )
        self.num_chats, self.samples_per_epoch = len(lengths), len(self._sequences.starts) - 1
        self.fill_ratio = float(lengths.sum() / (self.samples_per_epoch * sequence_length))
        self.limit: int | None = None
        self._order = lru_cache(maxsize=2)(self._make_order)

    def fetch(self, position: int) -> Sample:
        """Return the sequence at `position`."""
        if self.limit is not None and position >= self.limit:
            return self._sample([])
        epoch, index = divmod(position, self.samples_per_epoch)
        sequence = self._order(epoch)(index)
        start, stop = self._sequences.starts[sequence : sequence + 2]
        return self._sample(
            [self.chat(int(number)) for number in self._sequences.order[start:stop]]
        )

    def chat(self, number: int) -> Int64:
        """A chat as it was `coded`."""
        return self._dataset.document(self._first + number).astype(np.int64)

    def _make_order(self, epoch: int) -> Shuffle:
        return Shuffle(self.samples_per_epoch, key=("chats", self._seed, epoch))

    def _sample(self, chats: list[Int64]) -> Sample:
        length = self.sequence_length
        tokens = np.full(length, self._padding, dtype=np.int64)
        labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
        positions, documents = np.arange(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
        start = 0
        for chat in chats:
            here = slice(start, start + len(chat) - 1)
            tokens[here] = chat[:-1] >> 1
            labels[here] = np.where(chat[1:] & 1, chat[1:] >> 1, IGNORE_INDEX)
            start = here.stop
            if self._packing:
                positions[start:] = np.arange(length - start)
                documents[start:] += 1
        return Sample(tokens, labels, positions, documents)
