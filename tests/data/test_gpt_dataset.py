"""Documents to samples."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.gpt_dataset import IGNORE_INDEX, BlendedDataset, GPTDataset, open_dataset
from megatrain.data.indexed_dataset import IndexedDataset, IndexedWriter
from megatrain.errors import ConfigError, DataError

VOCAB = 1000


def write(prefix, lengths, *, first_token=0):
    """Writes documents of consecutive integers, so that a token shows its position."""
    with IndexedWriter(prefix, vocab_size=VOCAB) as writer:
        writer.add_documents(
            np.arange(first_token, first_token + sum(lengths)), lengths=list(lengths)
        )
    return IndexedDataset(prefix)


def make_source(data, *, sequence_length=4, seed=1, vocab_size=VOCAB, **rest):
    return GPTDataset(
        data, sequence_length=sequence_length, seed=seed, vocab_size=vocab_size, **rest
    )


def epoch_of(source, number=0):
    count = source.samples_per_epoch
    return [source.fetch(position) for position in range(number * count, (number + 1) * count)]


@settings(deadline=None, max_examples=40)
@given(num_tokens=st.integers(5, 200), seed=st.integers(0, 99), number=st.integers(0, 3))
def test_an_epoch_predicts_every_token_once(tmp_path_factory, num_tokens, seed, number):
    source = make_source(write(tmp_path_factory.mktemp("d") / "a", [num_tokens]), seed=seed)
    samples = epoch_of(source, number)
    predicted = Counter(np.concatenate([sample.labels for sample in samples]).tolist())
    assert set(predicted.values()) == {1}
    assert (
        len(predicted) == num_tokens - num_tokens % 4
    )  # less than one sample's tokens are left out
    for sample in samples:  # each is followed by its neighbour in the ring
        np.testing.assert_array_equal(sample.labels, (sample.tokens + 1) % num_tokens)


def test_example_of_the_docstring(tmp_path, monkeypatch):
    # tokens  0 1 2 3 4 5 6 7 8 9 10 11 12, sequence_length 4, offset 2
    source = make_source(write(tmp_path / "a", [13]))
    monkeypatch.setattr(
        source, "_epoch", lambda number: SimpleNamespace(offset=2, order=lambda index: index)
    )
    assert [source.fetch(i).tokens.tolist() for i in range(3)] == [
        [2, 3, 4, 5],
        [6, 7, 8, 9],
        [10, 11, 12, 0],
    ]
    assert [source.fetch(i).labels.tolist() for i in range(3)] == [
        [3, 4, 5, 6],
        [7, 8, 9, 10],
        [11, 12, 0, 1],
    ]


def test_origin_names_the_documents_of_a_sample(tmp_path):
    """A token shows its position; the documents have 5, 7, 3 and 9 tokens."""
    lengths, first = [5, 7, 3, 9], 500
    ends = np.cumsum(lengths)
    sources = [
        make_source(write(tmp_path / "a", lengths)),
        make_source(write(tmp_path / "b", lengths, first_token=first), seed=2),
    ]
    blended = BlendedDataset(sources, weights=[0.5, 0.5], seed=1)
    for position in range(40):
        sample = blended.fetch(position)
        places = [int(token) % first for token in [*sample.tokens, sample.labels[-1]]]
        name = "a" if sample.tokens[0] < first else "b"
        path, documents = blended.origin(position)
        assert path == str(tmp_path / name)
        assert set(documents) == {
            int(np.searchsorted(ends, place, side="right")) for place in places
        }


def test_epochs_have_their_own_cuts_and_order(tmp_path):
    source = make_source(write(tmp_path / "a", [900]), sequence_length=8)
    epochs = [[int(sample.tokens[0]) for sample in epoch_of(source, number)] for number in range(5)]
    assert len({first[0] % 8 for first in epochs}) > 1
    assert len({tuple(np.argsort(first)) for first in epochs}) == 5


def test_a_sample_is_a_function_of_seed_and_position(tmp_path):
    data = write(tmp_path / "a", [30] * 20)
    forward = [make_source(data).fetch(position).tokens.tolist() for position in range(400)]
    source = make_source(data)
    assert [source.fetch(position).tokens.tolist() for position in reversed(range(400))] == forward[
        ::-1
    ]
    assert [
        make_source(data, seed=2).fetch(position).tokens.tolist() for position in range(400)
    ] != forward


def test_without_a_mask_a_sample_is_one_stretch(tmp_path):
    sample = make_source(write(tmp_path / "a", [3] * 20)).fetch(0)
    assert sample.positions.tolist() == [0, 1, 2, 3]
    assert sample.documents.tolist() == [0, 0, 0, 0]
    assert IGNORE_INDEX not in sample.labels
    assert {field.dtype for field in sample if field is not None} == {np.dtype(np.int64)}


def test_the_document_mask(tmp_path, monkeypatch):
    #           0   1 2   3 4 5 6   7         documents, empty ones among them
    lengths = [1, 2, 0, 4, 1]
    source = make_source(write(tmp_path / "a", lengths), sequence_length=6, document_mask=True)
    expected = {
        0: ([0, 1, 2, 3, 4, 5], [-100, 2, -100, 4, 5, 6], [0, 0, 1, 0, 1, 2], [0, 1, 1, 2, 2, 2]),
        1: ([1, 2, 3, 4, 5, 6], [2, -100, 4, 5, 6, -100], [0, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]),
        # 7 ends the ring: the document at its other end is another one
        5: (
            [5, 6, 7, 0, 1, 2],
            [6, -100, -100, -100, 2, -100],
            [0, 1, 0, 0, 0, 1],
            [0, 0, 1, 2, 3, 3],
        ),
    }
    for offset, fields in expected.items():
        epoch = SimpleNamespace(offset=offset, order=lambda index: index)
        monkeypatch.setattr(source, "_epoch", lambda number, epoch=epoch: epoch)
        sample = source.fetch(0)
        assert [field.tolist() for field in sample if field is not None] == list(fields)


def test_a_sample_of_many_small_documents(tmp_path):
    source = make_source(write(tmp_path / "a", [2] * 100), sequence_length=90, document_mask=True)
    for sample in epoch_of(source):
        assert len(set(sample.documents.tolist())) in (45, 46)
        np.testing.assert_array_equal(sample.labels == IGNORE_INDEX, sample.tokens % 2 == 1)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 9), min_size=2, max_size=30), seed=st.integers(0, 99))
def test_the_document_mask_follows_the_documents(tmp_path_factory, lengths, seed):
    if sum(lengths) < 6:
        return
    data = write(tmp_path_factory.mktemp("d") / "a", lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for sample in epoch_of(make_source(data, sequence_length=5, seed=seed, document_mask=True)):
        owners, token, document = (
            owner[sample.tokens],
            sample.tokens.tolist(),
            sample.documents.tolist(),
        )
        for i in range(1, 5):
            same = owners[i] == owners[i - 1] and token[i] == token[i - 1] + 1
            assert document[i] == document[i - 1] + (not same)
            assert sample.positions[i] == (sample.positions[i - 1] + 1 if same else 0)
            assert sample.labels[i - 1] == (token[i] if same else IGNORE_INDEX)
        following = token[-1] + 1
        ends = following == len(owner) or owner[following] != owners[-1]
        assert sample.labels[-1] == (IGNORE_INDEX if ends else following)


def test_a_range_of_documents_is_all_that_is_seen(tmp_path):
    data = write(tmp_path / "a", [10, 20, 30, 40])
    source = make_source(data, first=1, last=3)
    seen = {
        int(token) for sample in epoch_of(source) + epoch_of(source, 1) for token in sample.tokens
    }
    assert seen <= set(range(10, 60))
    assert source.num_tokens == 50


def test_data_too_short_for_a_sample(tmp_path):
    data = write(tmp_path / "a", [2, 2])
    assert make_source(data, sequence_length=3).samples_per_epoch == 1
    with pytest.raises(DataError, match=r"a.bin has 4 tokens, but .* data.sequence_length=4"):
        make_source(data)


@pytest.mark.parametrize("vocab_size", [300, 65500])
def test_a_token_outside_the_vocabulary_is_named(tmp_path, vocab_size):
    wrong = vocab_size + 7 if vocab_size == 300 else 70_000
    with IndexedWriter(tmp_path / "a", vocab_size=400 if vocab_size == 300 else 80_000) as writer:
        writer.add_documents(np.array([1, 2, 3, 4, wrong, 5]), lengths=[3, 3])
    source = make_source(IndexedDataset(tmp_path / "a"), sequence_length=5, vocab_size=vocab_size)
    with pytest.raises(
        DataError, match=rf"a.bin: document 1 contains token id {wrong}, outside .* {vocab_size}"
    ):
        source.fetch(0)


def test_negative_ids_are_outside_too(tmp_path):
    with IndexedWriter(tmp_path / "a", vocab_size=80_000) as writer:
        writer.add(np.array([1, 2, 3, 4]))
    (tmp_path / "a.bin").write_bytes(np.array([1, -2, 3, 4], dtype="<i4").tobytes())
    with pytest.raises(DataError, match="document 0 contains token id -2"):
        make_source(IndexedDataset(tmp_path / "a"), sequence_length=3, vocab_size=80_000).fetch(0)


def section(**settings_):
    return SimpleNamespace(
        **{"train": None, "valid": None, "split": None, "document_mask": False, **settings_}
    )


def open_part(part="train", **settings_):
    return open_dataset(
        section(**settings_), part=part, sequence_length=4, seed=1, vocab_size=VOCAB
    )


def seen_by(samples, count=200):
    return {int(token) for position in range(count) for token in samples.fetch(position).tokens}


def test_a_split_keeps_training_and_validation_apart(tmp_path):
    write(tmp_path / "a", [10] * 10)
    path = str(tmp_path / "a")
    assert seen_by(open_part(train=path, split="8,2")) == set(range(80))
    assert seen_by(open_part("valid", train=path, split="8,2")) == set(range(80, 100))


def test_own_validation_data(tmp_path):
    write(tmp_path / "a", [50])
    write(tmp_path / "b", [50], first_token=500)
    settings_ = {"train": str(tmp_path / "a"), "valid": str(tmp_path / "b")}
    assert max(seen_by(open_part(**settings_))) < 50
    assert min(seen_by(open_part("valid", **settings_))) == 500


def test_a_blend_takes_its_share_of_each_source(tmp_path):
    write(tmp_path / "a", [50])
    write(tmp_path / "b", [50], first_token=500)
    blend = [
        {"path": str(tmp_path / "a"), "weight": 0.75},
        {"path": str(tmp_path / "b"), "weight": 0.25},
    ]
    samples = open_part(train=blend)
    assert sum(int(samples.fetch(position).tokens[0]) >= 500 for position in range(4096)) == 1024


@pytest.mark.parametrize(
    ("part", "settings_", "message"),
    [
        ("train", {}, r"data\.train=null names no data"),
        ("valid", {"train": "a"}, r"data\.valid=null names no data"),
        (
            "train",
            {"train": "a", "valid": "b", "split": "1,1"},
            r"data\.split=1,1 cannot be used with data\.valid",
        ),
        ("train", {"train": []}, r"data\.train=\[\] names no data"),
        ("train", {"train": [{"path": "a"}]}, r"data\.train=.* must have a path and a weight"),
        (
            "train",
            {"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 0}]},
            "must be a number above 0",
        ),
    ],
)
def test_invalid_settings_are_refused(part, settings_, message):
    with pytest.raises(ConfigError, match=message):
        open_part(part, **settings_)
