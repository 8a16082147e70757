"""Tokens on disk: Megatron-LM's indexed dataset, version 1, byte for byte, so that files go both ways.

    PREFIX.bin    every token of every document, one after the other, little-endian
    PREFIX.idx    b"MMIDIDX\\0\\0" | uint64 version = 1 | uint8 dtype | uint64 sequences | uint64 len(document_indices)
                  | int32 sequence_lengths[]      in tokens
                  | int64 sequence_pointers[]     in bytes into PREFIX.bin
                  | int64 document_indices[]      first sequence of each document, then the number of sequences

Source: megatron/core/datasets/indexed_dataset.py of Megatron-LM. A document may have several sequences; this project
writes one for each. LabelSpec is a memory map: opening costs the same for a thousand documents and for a billion.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatrain.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.number[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_CHUNK = (
    1 << 20
)  # index entries built at a time, so that writing the index takes megabytes however many there are

Tokens = np.ndarray[Any, np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype Megatron-LM stores tokens of this vocabulary in: uint16 below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Write documents one after the other; both files appear when the `with` block ends well, or not at all."""

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        """Open PREFIX.bin.partial for writing; raise DataError where that is impossible."""
        self.prefix = _prefix(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self._lengths = array("i")  # 4 bytes a document: all that is held in memory
        self._bin_path, self._idx_path = (
            _partial(self.prefix, ".bin"),
            _partial(self.prefix, ".idx"),
        )
        with _explained(self._bin_path):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(self._bin_path, "wb")  # noqa: SIM115 - closed in finish() or abandon()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, tokens: Tokens) -> None:
        """Append one document, int[length]; see `add_documents`."""
        self.add_documents(tokens, lengths=[len(tokens)])

    def add_documents(self, tokens: Tokens, *, lengths: list[int]) -> None:
        """Append documents of `lengths` tokens that lie end to end in `tokens`.

        Raises DataError for an id outside the vocabulary, a document over 2**31 - 1 tokens, and a full disk.
        """
        assert sum(lengths) == len(tokens), (sum(lengths), len(tokens))
        if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < self.vocab_size):
            wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise DataError(
                f"{self.prefix}: token id {wrong} lies outside the vocabulary of {self.vocab_size}"
            )
        if lengths and max(lengths) > np.iinfo(np.int32).max:
            raise DataError(
                f"{self.prefix}: a document of {max(lengths)} tokens; this format holds 2**31 - 1 at most"
            )
        with _explained(self._bin_path):
            self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.extend(lengths)
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        """Write the index, flush both files to disk and give them their names; DataError without any token."""
        if not self.num_tokens:
            raise DataError(f"{self.prefix}: there are no documents to write")
        with _explained(self._bin_path):
            _close_on_disk(self._bin)
        with _explained(self._idx_path):
            idx = open(self._idx_path, "wb")  # noqa: SIM115
            write_index(idx, lengths=np.frombuffer(self._lengths, dtype=np.int32), dtype=self.dtype)
            _close_on_disk(idx)
        self._rename()

    def abandon(self) -> None:
        """Drop everything written so far."""
        with suppress(OSError):  # a full disk refuses the last flush too
            self._bin.close()
        self._bin_path.unlink(missing_ok=True)
        self._idx_path.unlink(missing_ok=True)

    def _rename(self) -> None:
        # An old index goes first: at no moment does one describe another run's tokens.
        idx, bin_ = _named(self.prefix, ".idx"), _named(self.prefix, ".bin")
        with _explained(idx):
            idx.unlink(missing_ok=True)
            os.replace(self._bin_path, bin_)
            os.replace(self._idx_path, idx)
            folder = os.open(self.prefix.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.abandon()


def write_index(file: BinaryIO, *, lengths: Tokens, dtype: np.dtype[Any]) -> None:
    """Write the .idx of documents of one sequence each; `lengths` is int32[documents], in tokens."""
    count = len(lengths)
    file.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], count, count + 1))
    file.write(np.ascontiguousarray(lengths, dtype="<i4").data)
    offset = 0
    for first in range(0, count, _CHUNK):
        ends = offset + np.cumsum(lengths[first : first + _CHUNK], dtype=np.int64) * dtype.itemsize
        file.write(np.concatenate([np.array([offset], dtype="<i8"), ends[:-1]]).data)
        offset = int(ends[-1])
    for first in range(0, count + 1, _CHUNK):
        file.write(np.arange(first, min(first + _CHUNK, count + 1), dtype="<i8").data)


class IndexedDataset:
    """A memory-mapped PREFIX.bin with PREFIX.idx, read as one stream of tokens cut into documents."""

    def __init__(self, prefix: str | Path) -> None:
        """Map both files; raise DataError when one is missing, damaged, or does not fit the other."""
        self.prefix = _prefix(prefix)
        self.bin_path, self.idx_path = _named(self.prefix, ".bin"), _named(self.prefix, ".idx")
        for path in (self.idx_path, self.bin_path):
            with _explained(path):
                if not path.is_file():
                    raise DataError(
                        f"there is no file {path}; a data set is named without its .bin and .idx"
                    )
        with _explained(self.idx_path):
            self.dtype, num_sequences, num_indices = _read_header(self.idx_path)
            self._map_index(num_sequences, num_indices)
        with _explained(self.bin_path):
            self._map_tokens()

    def _map_index(self, num_sequences: int, num_indices: int) -> None:
        index = np.memmap(self.idx_path, mode="r")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_indices
        if len(index) != expected:
            raise DataError(
                f"{self.idx_path} is {len(index)} bytes long, but its header ({num_sequences} sequences, "
                f"{num_indices} document indices) makes {expected}; it is damaged or of another kind"
            )
        if num_sequences < 1 or num_indices < 2:
            raise DataError(f"{self.idx_path} holds no documents")
        # np.frombuffer and not slices of the memmap: its subclass costs microseconds on every small read.
        at = [_HEADER.size, _HEADER.size + 4 * num_sequences, _HEADER.size + 12 * num_sequences]
        self._lengths = np.frombuffer(index, dtype="<i4", count=num_sequences, offset=at[0])
        self._pointers = np.frombuffer(index, dtype="<i8", count=num_sequences, offset=at[1])
        self._documents = np.frombuffer(index, dtype="<i8", count=num_indices, offset=at[2])
        if (
            self._documents[0] != 0
            or self._documents[-1] != num_sequences
            or self._pointers[0] != 0
        ):
            raise DataError(
                f"{self.idx_path} is damaged: its documents run from sequence {self._documents[0]} to "
                f"{self._documents[-1]} and its first pointer is {self._pointers[0]}, not 0 to {num_sequences} and 0"
            )

    def _map_tokens(self) -> None:
        size = self.bin_path.stat().st_size
        expected = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if size != expected:
            raise DataError(
                f"{self.bin_path} is {size} bytes long, but {self.idx_path} describes {expected} bytes; "
                "one of them is damaged or of another run"
            )
        if not size:
            raise DataError(f"{self.bin_path} holds no tokens")
        self._tokens = np.frombuffer(np.memmap(self.bin_path, mode="r"), dtype=self.dtype)

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream."""
        return len(self._tokens)

    @property
    def num_documents(self) -> int:
        """Documents in the stream, empty ones included."""
        return len(self._documents) - 1

    def tokens(self, start: int, length: int) -> Tokens:
        """Return tokens [start, start + length) of the stream as a read-only view of the file, dtype[length]."""
        assert 0 <= start <= start + length <= self.num_tokens, (start, length, self.num_tokens)
        return self._tokens[start : start + length]

    def document(self, index: int) -> Tokens:
        """Return document `index`, dtype[its tokens]."""
        start, end = (int(offset) for offset in self.document_offsets(index, index + 1))
        return self.tokens(start, end - start)

    def document_start(self, index: int) -> int:
        """Return the token at which document `index` starts; for `num_documents`, the number of tokens."""
        sequence, sequences = int(self._documents[index]), len(self._pointers)
        if sequence == sequences:
            return len(self._tokens)
        start = (
            int(self._pointers[sequence]) // self.dtype.itemsize
            if 0 <= sequence < sequences
            else -1
        )
        if not 0 <= start <= len(self._tokens):
            raise DataError(
                f"{self.idx_path} is damaged: document {index} starts outside the tokens"
            )
        return start

    def document_at(self, token: int) -> int:
        """Return the document that holds `token`: the last that starts at or before it.

        A binary search in the file itself. An array of starts would be eight bytes a document on every rank, and
        np.searchsorted would copy the whole index on every call, since the format does not align its int64.
        """
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def starts_within(self, start: int, stop: int) -> Tokens:
        """Return the starts of documents s with start < s < stop, in tokens: int64[any number]."""
        found: list[Tokens] = [np.empty(0, dtype=np.int64)]
        first = self.document_at(start) + 1
        while first < self.num_documents:
            # A few at a time: cheaper than a second search for the last, and bounded when a window holds thousands.
            last = min(first + 15, self.num_documents - 1)
            offsets = self.document_offsets(first, last)
            found.append(offsets[: offsets.searchsorted(stop)])
            if offsets[-1] >= stop:
                break
            first = last + 1
        return np.concatenate(found)

    def document_offsets(self, first: int = 0, last: int | None = None) -> Tokens:
        """Return where documents `first` to `last` start in the stream, in tokens: int64[last - first + 1].

        `last` is `num_documents` when left out; its own start is the number of tokens. Raises DataError when they do
        not rise, which a damaged index shows.
        """
        last = self.num_documents if last is None else last
        sequences = self._documents[first : last + 1]
        inside = sequences.clip(0, len(self._pointers) - 1)
        offsets = np.where(
            sequences == inside, self._pointers[inside] // self.dtype.itemsize, self.num_tokens
        )
        if (offsets[1:] < offsets[:-1]).any() or offsets[0] < 0 or offsets[-1] > self.num_tokens:
            raise DataError(
                f"{self.idx_path} is damaged: the starts of documents {first} to {last} do not rise"
            )
        return offsets


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Return dtype, number of sequences and length of document_indices; DataError when this is no such index."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise DataError(
            f"{path} is {len(head)} bytes long, shorter than the {_HEADER.size} bytes of a header"
        )
    magic, version, code, num_sequences, num_indices = _HEADER.unpack(head)
    if magic != _MAGIC:
        raise DataError(f"{path} is no Megatron index: it starts with {magic!r}, not {_MAGIC!r}")
    if version != 1:
        raise DataError(
            f"{path} is a Megatron index of version {version}; only version 1 can be read"
        )
    if code not in _DTYPES:
        raise DataError(f"{path} names dtype code {code}; the format has 1 to 8")
    return np.dtype(_DTYPES[code]).newbyteorder("<"), num_sequences, num_indices


def _prefix(prefix: str | Path) -> Path:
    if Path(prefix).name in ("", ".."):
        raise DataError(
            f"`{prefix}` is a folder at most; a data set is named by the prefix of its .bin and .idx, such as data/train"
        )
    return Path(prefix)


def _named(prefix: Path, suffix: str) -> Path:
    # Path.with_suffix would eat the end of a prefix such as "c4.en".
    return prefix.with_name(prefix.name + suffix)


def _partial(prefix: Path, suffix: str) -> Path:
    # A fixed name: what a killed run leaves behind is overwritten by the next one and never read.
    return prefix.with_name(prefix.name + suffix + ".partial")


def _close_on_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence."""
    try:
        yield
    except OSError as error:
        reason = (
            "the disk is full"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else error.strerror or str(error)
        )
        raise DataError(f"{path}: {reason}") from error
