"""Tokens on disk: version 1 of Megatron-LM's indexed dataset, byte for byte.

    PREFIX.bin    every token of every document, one after the other, little-endian
    PREFIX.idx    b"MMIDIDX\\0\\0" | uint64 version = 1 | uint8 dtype | uint64 sequences
                  | uint64 len(document_indices)
                  | int32 sequence_lengths[]      in tokens
                  | int64 sequence_pointers[]     in bytes into PREFIX.bin
                  | int64 document_indices[]      first sequence of each document, then their number

Source: megatron/core/datasets/indexed_dataset.py of Megatron-LM. A document may have several
sequences; `IndexedWriter` writes one for each. Files are mapped into memory, so opening takes the
same time for a thousand documents and for a billion.
"""

from __future__ import annotations

import errno
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatrain.errors import DataError
from megatrain.files import write_atomically

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
_CHUNK = 1 << 20
"""Index entries that are built at a time, which bounds the memory of writing an index."""

Tokens = np.ndarray[Any, np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns Megatron-LM's dtype of tokens of this vocabulary: uint16 below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Writer of PREFIX.bin and PREFIX.idx, used in a `with` block.

    Both files appear when the block ends without an error, or not at all.

    Args:
        prefix: the path of both files, without .bin and .idx.
        vocab_size: all token ids must be below it. It determines the dtype.

    Raises:
        DataError: the files cannot be written, or there are no tokens at the end of the block.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        self.prefix = _prefix(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self._lengths = array("i")  # 4 bytes per document: all that is kept in memory
        self._idx_path, self._bin_path = _path(self.prefix, ".idx"), _path(self.prefix, ".bin")

    def __enter__(self) -> IndexedWriter:
        # The files get their names in reverse order: first the tokens, then the index.
        with _explain_errors(self._bin_path), ExitStack() as stack:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._temporary_idx = stack.enter_context(write_atomically(self._idx_path))
            self._bin = stack.enter_context(write_atomically(self._bin_path)).open("wb")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            with suppress(OSError):  # a full disk also refuses the last flush
                self._bin.close()
            self._stack.__exit__(kind, error, trace)
            return
        with _explain_errors(self._bin_path), self._stack:
            self._finish()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, tokens: Tokens) -> None:
        """Appends one document, int[length]; see `add_documents`."""
        self.add_documents(tokens, lengths=[len(tokens)])

    def add_documents(self, tokens: Tokens, *, lengths: list[int]) -> None:
        """Appends documents of `lengths` tokens, which are concatenated in `tokens`.

        Raises:
            DataError: a token id is outside the vocabulary, a document is longer than the format
                allows, or the file cannot be written.
        """
        assert sum(lengths) == len(tokens), (sum(lengths), len(tokens))
        if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < self.vocab_size):
            wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise DataError(
                f"{self.prefix}: token id {wrong} is outside the vocabulary of {self.vocab_size}"
            )
        if lengths and max(lengths) > np.iinfo(np.int32).max:
            raise DataError(
                f"{self.prefix}: a document has {max(lengths)} tokens; "
                "the format allows at most 2**31 - 1"
            )
        with _explain_errors(self._bin_path):
            self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.extend(lengths)
        self.num_tokens += len(tokens)

    def _finish(self) -> None:
        self._bin.close()
        if not self.num_tokens:
            raise DataError(f"{self.prefix}: there are no documents to write")
        with self._temporary_idx.open("wb") as file:
            lengths = np.frombuffer(self._lengths, dtype=np.int32)
            write_index(file, lengths=lengths, dtype=self.dtype)
        # An old index must never describe new tokens.
        self._idx_path.unlink(missing_ok=True)


def write_index(file: BinaryIO, *, lengths: Tokens, dtype: np.dtype[Any]) -> None:
    """Writes the .idx of documents with one sequence each, of `lengths` int32[documents] tokens."""
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
    """A memory-mapped dataset PREFIX.bin and PREFIX.idx: a stream of tokens, cut into documents.

        >>> from megatrain.data import IndexedDataset
        >>> dataset = IndexedDataset("data/train")
        >>> dataset.num_documents, dataset.num_tokens
        (2, 5)
        >>> dataset.document(1).tolist()
        [7, 8, 2]
        >>> len(dataset)
        2

    Args:
        prefix: the path of both files without .bin and .idx, such as "data/train". Megatron-LM's
            `preprocess_data.py` and `megatrain preprocess` write them.

    Attributes:
        dtype: the type of a token.
        num_documents: the number of documents, empty ones included.
        num_tokens: the number of tokens.

    Raises:
        DataError: a file is missing or damaged, or the two files do not match.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = _prefix(prefix)
        self.bin_path, self.idx_path = _path(self.prefix, ".bin"), _path(self.prefix, ".idx")
        for path in (self.idx_path, self.bin_path):
            with _explain_errors(path):
                if not path.is_file():
                    raise DataError(
                        f"there is no file {path}; a dataset is named without .bin and .idx"
                    )
        with _explain_errors(self.idx_path):
            self.dtype, num_sequences, num_indices = _read_header(self.idx_path)
            self._map_index(num_sequences, num_indices)
        with _explain_errors(self.bin_path):
            self._map_tokens()

    def _map_index(self, num_sequences: int, num_indices: int) -> None:
        index = np.memmap(self.idx_path, mode="r")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_indices
        if len(index) != expected:
            raise DataError(
                f"{self.idx_path} is {len(index)} bytes long, but {num_sequences} sequences and "
                f"{num_indices} document indices take {expected}; it is damaged"
            )
        if num_sequences < 1 or num_indices < 2:
            raise DataError(f"{self.idx_path} contains no documents")
        # np.frombuffer, because small reads of np.memmap's subclass take microseconds more.
        offset = _HEADER.size
        self._lengths = np.frombuffer(index, dtype="<i4", count=num_sequences, offset=offset)
        offset += 4 * num_sequences
        self._pointers = np.frombuffer(index, dtype="<i8", count=num_sequences, offset=offset)
        offset += 8 * num_sequences
        self._documents = np.frombuffer(index, dtype="<i8", count=num_indices, offset=offset)
        if (
            self._documents[0] != 0
            or self._documents[-1] != num_sequences
            or self._pointers[0] != 0
        ):
            raise DataError(
                f"{self.idx_path} is damaged: its documents run from sequence {self._documents[0]} "
                f"to {self._documents[-1]}, not 0 to {num_sequences}, "
                f"or its first pointer {self._pointers[0]} is not 0"
            )

    def _map_tokens(self) -> None:
        size = self.bin_path.stat().st_size
        expected = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if size != expected:
            raise DataError(
                f"{self.bin_path} is {size} bytes long, but {self.idx_path} describes "
                f"{expected} bytes; one of them is damaged or belongs to another dataset"
            )
        if not size:
            raise DataError(f"{self.bin_path} contains no tokens")
        self._tokens = np.frombuffer(np.memmap(self.bin_path, mode="r"), dtype=self.dtype)

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return len(self._tokens)

    @property
    def num_documents(self) -> int:
        """The number of documents, empty ones included."""
        return len(self._documents) - 1

    def __len__(self) -> int:
        return self.num_documents

    def tokens(self, start: int, length: int) -> Tokens:
        """Returns tokens [start, start + length) as a read-only view of the file, dtype[length]."""
        assert 0 <= start <= start + length <= self.num_tokens, (start, length, self.num_tokens)
        return self._tokens[start : start + length]

    def document(self, index: int) -> Tokens:
        """Returns the tokens of document `index` as a read-only view of the file, dtype[length]."""
        start, end = (int(offset) for offset in self.document_offsets(index, index + 1))
        return self.tokens(start, end - start)

    def document_start(self, index: int) -> int:
        """Returns the first token of document `index`; `num_tokens` for `num_documents`."""
        sequence, sequences = int(self._documents[index]), len(self._pointers)
        if sequence == sequences:
            return len(self._tokens)
        is_valid = 0 <= sequence < sequences
        start = int(self._pointers[sequence]) // self.dtype.itemsize if is_valid else -1
        if not 0 <= start <= len(self._tokens):
            raise DataError(
                f"{self.idx_path} is damaged: document {index} starts outside the tokens"
            )
        return start

    def document_at(self, token: int) -> int:
        """Returns the document of `token`: the last that starts at or before it.

        Searches in the mapped file. An array of starts would take eight bytes per document on every
        rank. np.searchsorted would copy the index on every call, because its int64 are not aligned.
        """
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def starts_within(self, start: int, stop: int) -> Tokens:
        """Returns the starts s of documents with start < s < stop, in tokens: int64[any number]."""
        found: list[Tokens] = [np.empty(0, dtype=np.int64)]
        first = self.document_at(start) + 1
        while first < self.num_documents:
            # 16 at a time: cheaper than a second search, and bounded if there are many.
            last = min(first + 15, self.num_documents - 1)
            offsets = self.document_offsets(first, last)
            found.append(offsets[: offsets.searchsorted(stop)])
            if offsets[-1] >= stop:
                break
            first = last + 1
        return np.concatenate(found)

    def document_offsets(self, first: int = 0, last: int | None = None) -> Tokens:
        """Returns the starts of documents `first` to `last`, in tokens: int64[last - first + 1].

        The default of `last` is `num_documents`, whose start is the number of tokens.

        Raises:
            DataError: the starts do not increase, so the index is damaged.
        """
        last = self.num_documents if last is None else last
        sequences = self._documents[first : last + 1]
        inside = sequences.clip(0, len(self._pointers) - 1)
        offsets = np.where(
            sequences == inside, self._pointers[inside] // self.dtype.itemsize, self.num_tokens
        )
        if (offsets[1:] < offsets[:-1]).any() or offsets[0] < 0 or offsets[-1] > self.num_tokens:
            raise DataError(
                f"{self.idx_path} is damaged: the starts of documents {first} to {last} decrease"
            )
        return offsets


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Returns dtype, number of sequences and length of document_indices."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise DataError(
            f"{path} is {len(head)} bytes long, shorter than the header of {_HEADER.size} bytes"
        )
    magic, version, code, num_sequences, num_indices = _HEADER.unpack(head)
    if magic != _MAGIC:
        raise DataError(f"{path} is not a Megatron index: it starts with {magic!r}, not {_MAGIC!r}")
    if version != 1:
        raise DataError(f"{path}: version {version} of the index is not supported (supported: 1)")
    if code not in _DTYPES:
        raise DataError(f"{path}: dtype code {code} is not valid; the format has 1 to 8")
    return np.dtype(_DTYPES[code]).newbyteorder("<"), num_sequences, num_indices


def _prefix(prefix: str | Path) -> Path:
    if Path(prefix).name in ("", ".."):
        raise DataError(
            f"`{prefix}` is not the prefix of a dataset; "
            "give the path of its files without .bin and .idx, such as data/train"
        )
    return Path(prefix)


def _path(prefix: Path, suffix: str) -> Path:
    # Path.with_suffix would replace the end of a prefix such as "c4.en".
    return prefix.with_name(prefix.name + suffix)


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Raises DataError in place of the operating system's errors."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if is_full else error.strerror or str(error)
        raise DataError(f"{path}: {reason}") from error
