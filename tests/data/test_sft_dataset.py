"""Sequences of prepared chats, packed and not, over epochs and beyond the limit."""

from __future__ import annotations

import numpy as np
import pytest

from megatrain.data.gpt_dataset import IGNORE_INDEX
from megatrain.data.indexed_dataset import IndexedDataset, IndexedWriter
from megatrain.data.sft_dataset import SFTDataset, encode_loss_mask

CHATS = [([1, 2, 3, 4, 5], [0, 0, 1, 0, 1]), ([6, 7, 8], [0, 1, 1]), ([9, 10], [0, 1])]


@pytest.fixture
def dataset(tmp_path):
    with IndexedWriter(tmp_path / "d", vocab_size=40) as writer:
        for tokens, loss_mask in CHATS:
            writer.add(encode_loss_mask(np.array(tokens), np.array(loss_mask, dtype=bool)))
    return IndexedDataset(tmp_path / "d")


def lists(sample):
    return [field.tolist() for field in sample if field is not None]


def samples(dataset, **settings):
    return SFTDataset(
        dataset, **{"sequence_length": 8, "packing": True, "seed": 0, "padding": 0} | settings
    )


def test_packed(dataset):
    """The chats take 4 + 2 + 1 of 8 places; the last is padding."""
    packed = samples(dataset)
    assert (packed.samples_per_epoch, packed.num_chats, packed.fill_ratio) == (1, 3, 7 / 8)
    x = IGNORE_INDEX
    assert lists(packed.fetch(0)) == [
        [1, 2, 3, 4, 6, 7, 9, 0],
        [x, 3, x, 5, 7, 8, 10, x],
        [0, 1, 2, 3, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 2, 3],
    ]


def test_alone(dataset):
    alone = samples(dataset, packing=False, first=1, last=2)
    x = IGNORE_INDEX
    assert lists(alone.fetch(0)) == [
        [6, 7, 0, 0, 0, 0, 0, 0],
        [7, 8, x, x, x, x, x, x],
        list(range(8)),
        [0] * 8,
    ]
    assert (alone.samples_per_epoch, alone.fill_ratio) == (1, 2 / 8)


def test_every_epoch_has_every_chat_in_an_order_of_its_own(dataset):
    alone = samples(dataset, packing=False)
    orders = [
        [int(alone.fetch(epoch * 3 + index).tokens[0]) for index in range(3)] for epoch in range(12)
    ]
    assert all(sorted(order) == [1, 6, 9] for order in orders)
    assert len({tuple(order) for order in orders}) > 2
    again = samples(dataset, packing=False)
    assert [int(again.fetch(30 + index).tokens[0]) for index in range(3)] == orders[10]


def test_beyond_the_limit_there_is_padding(dataset):
    alone = samples(dataset, packing=False)
    alone.limit = 4
    assert (alone.fetch(3).labels != IGNORE_INDEX).any()
    for position in (4, 5, 100):
        assert (alone.fetch(position).labels == IGNORE_INDEX).all()
        assert (alone.fetch(position).tokens == 0).all()
