"""The .bin/.idx format, compared with handwritten bytes and, if installed, with Megatron-LM."""

from __future__ import annotations

import doctest
import errno
import os
import struct
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

from megatrain.data import indexed_dataset
from megatrain.data.indexed_dataset import IndexedDataset, IndexedWriter, token_dtype
from megatrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"


def write_files(prefix, tokens, lengths, documents, *, dtype="<u2", code=8, magic=MAGIC, version=1):
    """Writes both files with struct alone, following the description of the format."""
    data = np.array(tokens, dtype=dtype).tobytes()
    size = np.dtype(dtype).itemsize
    pointers = [sum(lengths[:i]) * size for i in range(len(lengths))]
    head = magic + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    (prefix.parent / f"{prefix.name}.bin").write_bytes(data)
    (prefix.parent / f"{prefix.name}.idx").write_bytes(
        head + body + struct.pack(f"<{len(documents)}q", *documents)
    )
    return prefix


def read(path):
    return path.read_bytes()


def test_writer_makes_the_bytes_that_the_format_describes(tmp_path):
    with IndexedWriter(tmp_path / "ours", vocab_size=300) as writer:
        writer.add(np.array([1, 2, 299]))
        writer.add_documents(np.array([7, 8, 9, 10, 11]), lengths=[1, 4])
    write_files(tmp_path / "golden", [1, 2, 299, 7, 8, 9, 10, 11], [3, 1, 4], [0, 1, 2, 3])
    assert read(tmp_path / "ours.bin") == read(tmp_path / "golden.bin")
    assert read(tmp_path / "ours.idx") == read(tmp_path / "golden.idx")


def test_an_index_built_in_pieces_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_dataset, "_CHUNK", 2)
    lengths = [3, 1, 4, 1, 5]
    with IndexedWriter(tmp_path / "ours", vocab_size=300) as writer:
        writer.add_documents(np.arange(14), lengths=lengths)
    write_files(tmp_path / "golden", range(14), lengths, range(6))
    assert read(tmp_path / "ours.idx") == read(tmp_path / "golden.idx")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, "uint16"), (65499, "uint16"), (65500, "int32")]
)
def test_dtype_follows_the_vocabulary_as_in_megatron(vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype


def test_large_vocabulary_round_trip(tmp_path):
    with IndexedWriter(tmp_path / "a", vocab_size=150_000) as writer:
        writer.add(np.array([0, 149_999]))
    data = IndexedDataset(tmp_path / "a")
    assert data.dtype == np.int32
    assert data.document(0).tolist() == [0, 149_999]


def test_documents_of_several_sequences(tmp_path):
    #  sequences   [10 11] [12] [13 14 15] [16] ; documents: the first two, the next, the last
    data = IndexedDataset(write_files(tmp_path / "m", range(10, 17), [2, 1, 3, 1], [0, 2, 3, 4]))
    assert (data.num_documents, data.num_tokens) == (3, 7)
    assert data.document_offsets().tolist() == [0, 3, 6, 7]
    assert data.document_offsets(1, 2).tolist() == [3, 6]
    assert [data.document(i).tolist() for i in range(3)] == [[10, 11, 12], [13, 14, 15], [16]]
    assert [data.document_at(token) for token in range(7)] == [0, 0, 0, 1, 1, 1, 2]


def test_empty_documents_among_others(tmp_path):
    data = IndexedDataset(write_files(tmp_path / "m", range(3), [2, 0, 1], [0, 1, 2, 3, 3]))
    assert data.document_offsets().tolist() == [0, 2, 2, 3, 3]
    assert [data.document(i).tolist() for i in range(4)] == [[0, 1], [], [2], []]
    assert data.document_at(2) == 2


@pytest.mark.parametrize(
    ("code", "dtype"), enumerate(["u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"], start=1)
)
def test_every_dtype_code_is_read(tmp_path, code, dtype):
    data = IndexedDataset(
        write_files(tmp_path / "m", [1, 2, 3], [3], [0, 1], dtype=dtype, code=code)
    )
    assert data.dtype == np.dtype(dtype)
    assert data.tokens(1, 2).tolist() == [2, 3]


def test_a_prefix_with_a_dot_keeps_it(tmp_path):
    with IndexedWriter(tmp_path / "c4.en", vocab_size=300) as writer:
        writer.add(np.array([1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c4.en.bin", "c4.en.idx"]
    assert IndexedDataset(tmp_path / "c4.en").num_tokens == 1


def cut(path, by):
    path.write_bytes(read(path)[:-by])


DAMAGES = {
    "no .idx": (lambda p: p.with_name("m.idx").unlink(), "there is no file .*m.idx"),
    "no .bin": (lambda p: p.with_name("m.bin").unlink(), "there is no file .*m.bin"),
    "header cut": (
        lambda p: p.with_name("m.idx").write_bytes(MAGIC),
        "m.idx is 9 bytes long, shorter than the header of 34",
    ),
    "empty .idx": (lambda p: p.with_name("m.idx").write_bytes(b""), "m.idx is 0 bytes long"),
    "magic": (
        lambda p: write_files(p, [1], [1], [0, 1], magic=b"MMIDIDX\x00\x01"),
        "not a Megatron index",
    ),
    "version": (
        lambda p: write_files(p, [1], [1], [0, 1], version=2),
        "version 2 of the index is not supported",
    ),
    "dtype": (lambda p: write_files(p, [1], [1], [0, 1], code=9), "dtype code 9"),
    "index cut": (
        lambda p: cut(p.with_name("m.idx"), 5),
        "m.idx is 77 bytes long, but .* take 82",
    ),
    "tokens cut": (
        lambda p: cut(p.with_name("m.bin"), 2),
        "m.bin is 8 bytes long, but .*m.idx describes 10 bytes",
    ),
    "no documents": (lambda p: write_files(p, [], [], [0]), "m.idx contains no documents"),
    "no tokens": (lambda p: write_files(p, [], [0], [0, 1]), "m.bin contains no tokens"),
    "wrong last document": (
        lambda p: write_files(p, [1], [1], [0, 2]),
        "m.idx is damaged: its documents run",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    prefix = write_files(tmp_path / "m", range(5), [2, 3], [0, 1, 2])
    spoil, message = DAMAGES[damage]
    spoil(prefix)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("size", [0, 8, 9, 17, 18, 26, 33, 34, 38, 42, 50, 58, 66, 74, 81])
def test_an_index_cut_anywhere_is_refused(tmp_path, size):
    prefix = write_files(tmp_path / "m", range(5), [2, 3], [0, 1, 2])
    (tmp_path / "m.idx").write_bytes(read(tmp_path / "m.idx")[:size])
    with pytest.raises(DataError, match=f"m.idx is {size} bytes long"):
        IndexedDataset(prefix)


def test_a_bit_that_flips_in_the_index_is_refused_or_harms_nothing(tmp_path):
    prefix = write_files(tmp_path / "m", range(7), [2, 3, 1, 1], [0, 1, 3, 4])
    whole, refused = read(tmp_path / "m.idx"), 0
    for at, bit in ((at, bit) for at in range(len(whole)) for bit in (0, 3, 7)):
        (tmp_path / "m.idx").write_bytes(
            whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
        )
        try:
            data = IndexedDataset(prefix)
            assert all(data.document(i).max(initial=0) < 7 for i in range(data.num_documents))
            data.starts_within(1, 6)
        except DataError:
            refused += 1
    assert refused > len(whole)


@pytest.mark.parametrize("prefix", ["", ".", "/", ".."])
def test_a_prefix_without_a_name_is_refused(prefix):
    for use in (IndexedDataset, lambda prefix: IndexedWriter(prefix, vocab_size=300)):
        with pytest.raises(DataError, match="is not the prefix of a dataset"):
            use(prefix)


def test_name_that_is_too_long_for_the_system_is_reported():
    with pytest.raises(DataError, match=r"aaa\.idx: File name too long"):
        IndexedDataset("a" * 300)


def test_decreasing_starts_are_refused(tmp_path):
    data = IndexedDataset(write_files(tmp_path / "m", range(6), [2, 3, 1], [0, 2, 1, 3]))
    with pytest.raises(
        DataError, match=r"m.idx is damaged: the starts of documents 0 to 3 decrease"
    ):
        data.document_offsets()


def fail_while_writing(prefix):
    with suppress(RuntimeError), IndexedWriter(prefix, vocab_size=300) as writer:
        writer.add(np.array([3]))
        raise RuntimeError


def test_failed_writer_leaves_no_files(tmp_path):
    fail_while_writing(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_files_appear_at_the_end_only(tmp_path):
    with IndexedWriter(tmp_path / "a", vocab_size=300) as writer:
        writer.add(np.array([1, 2]))
        assert not (tmp_path / "a.bin").exists()
        assert not (tmp_path / "a.idx").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_failed_run_leaves_the_files_before_it(tmp_path):
    write_files(tmp_path / "a", [1, 2], [2], [0, 1])
    before = read(tmp_path / "a.bin"), read(tmp_path / "a.idx")
    fail_while_writing(tmp_path / "a")
    assert (read(tmp_path / "a.bin"), read(tmp_path / "a.idx")) == before


@pytest.mark.parametrize("wrong", [300, -1])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, wrong):
    with (
        pytest.raises(DataError, match=f"token id {wrong} is outside the vocabulary of 300"),
        IndexedWriter(tmp_path / "a", vocab_size=300) as writer,
    ):
        writer.add(np.array([1, wrong]))


def test_writing_nothing_is_refused(tmp_path):
    with (
        pytest.raises(DataError, match="no documents"),
        IndexedWriter(tmp_path / "a", vocab_size=300),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_reported_and_leaves_no_files(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(DataError, match=r"a.bin: the disk is full"),
        IndexedWriter(tmp_path / "a", vocab_size=300) as writer,
    ):
        writer.add(np.array([1]))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def megatron_dataset():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def test_megatron_reads_ours_and_writes_the_same(tmp_path, megatron_dataset):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 5000, size=length) for length in (3, 1, 40, 7)]
    builder = megatron_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    with IndexedWriter(tmp_path / "ours", vocab_size=5000) as writer:
        for document in documents:
            writer.add(document)
            builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert read(tmp_path / "ours.bin") == read(tmp_path / "theirs.bin")
    assert read(tmp_path / "ours.idx") == read(tmp_path / "theirs.idx")
    theirs = megatron_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(4)] == [document.tolist() for document in documents]


def test_we_read_megatrons_documents_of_several_sequences(tmp_path, megatron_dataset):
    builder = megatron_dataset.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document(np.arange(5), [2, 3])
    builder.add_document(np.arange(5, 9), [1, 3])
    builder.finalize(str(tmp_path / "m.idx"))
    data = IndexedDataset(tmp_path / "m")
    assert [data.document(i).tolist() for i in range(2)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]


def test_example_of_the_public_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with IndexedWriter("data/train", vocab_size=300) as writer:
        writer.add_documents(np.array([5, 2, 7, 8, 2]), lengths=[2, 3])
    examples = doctest.DocTestFinder(recurse=False).find(IndexedDataset, globs={})
    assert [doctest.DocTestRunner().run(example) for example in examples] == [(0, 5)]


def test_package_is_imported_lazily():
    code = (
        "import sys, megatrain.data as data; assert 'numpy' not in sys.modules; "
        "assert data.IndexedDataset.__name__ == 'IndexedDataset'; assert not hasattr(data, 'other')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_error_of_the_block_is_raised_unchanged(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="input"),
        IndexedWriter(tmp_path / "a", vocab_size=300),
    ):
        raise FileNotFoundError("input")
    assert list(tmp_path.iterdir()) == []
