"""Find the documents in text files, a bounded piece at a time.

| file                                  | one document is                           |
|---------------------------------------|-------------------------------------------|
| .jsonl .ndjson .json (.gz, .zst)      | one line, an object with a text field     |
| .txt (.gz, .zst)                      | the whole file                            |
| .parquet                              | one row, its text column                  |

Reading happens in two halves so that the costly one can run in many processes: `read_blocks` only cuts files into
blocks of raw records, `parse_block` turns a block into texts and names every record that is none. Memory is bounded by
the block's size and by the largest document, MAX_DOCUMENT_BYTES at most.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from megatrain.errors import DataError

MAX_DOCUMENT_BYTES = (
    128 << 20
)  # the tokenizer takes some thirty times as much memory while it works on one
BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_LINES, _WHOLE, _ROWS = (".jsonl", ".ndjson", ".json"), (".txt",), (".parquet",)
_COMPRESSED = (".gz", ".zst")

Form = Literal["line", "file", "row"]


class TextBlock(NamedTuple):
    """Consecutive records of one file, not yet looked into."""

    path: str
    form: Form
    first: int  # number of the first record, from 1
    records: list[bytes | None]  # None: no value, or longer than MAX_DOCUMENT_BYTES (`too_long`)
    too_long: frozenset[int] = frozenset()


class FileProblem(NamedTuple):
    """A record that is no document."""

    path: str
    form: Form
    number: int
    reason: str

    def __str__(self) -> str:
        place = self.path if self.form == "file" else f"{self.path}, {self.form} {self.number}"
        return f"{place}: {self.reason}"


class InputFiles(NamedTuple):
    """The files to read, in order, and what folders held beside them."""

    files: list[Path]
    ignored: list[Path]  # of other kinds, and links to folders, which are not followed


def find_inputs(inputs: Sequence[str | Path]) -> InputFiles:
    """Return the files that files, folders (with all below them) and globs name; DataError for none or doubles.

    The order is that of `inputs`, and sorted by name within a folder or a glob.
    """
    files: list[Path] = []
    ignored: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            below = sorted(
                p
                for p in path.rglob("*")
                if (p.is_file() or p.is_symlink()) and not _hidden(p.relative_to(path))
            )
            known = [
                p for p in below if _form(p) is not None and not p.is_dir()
            ]  # a link to nothing is a file that is lost
            ignored += [p for p in below if _form(p) is None or p.is_dir()]
        else:
            known = (
                [path]
                if path.is_file()
                else sorted(map(Path, glob.glob(str(given), recursive=True)))
            )
        if not known:
            raise DataError(f"{given} {_why_nothing(given)}")
        files += known
    _check(files)
    return InputFiles(files, ignored)


def _why_nothing(given: str | Path) -> str:
    if Path(given).exists():
        return "names no file of text"
    return "matches no file" if glob.has_magic(str(given)) else "does not exist"


def read_blocks(files: Sequence[Path], *, field: str | None) -> Iterator[TextBlock]:
    """Yield the records of all files in order, about BLOCK_BYTES at a time.

    With no `field` the record of a parquet row is the whole row as JSON, for `parse_objects`.

    Raises DataError for a file that cannot be read to its end; nothing after that point would be in the right place.
    """
    for path in files:
        with _readable(path):
            form = _form(path)
            if form == "row":
                yield from _row_blocks(path, field)
            elif form == "line":
                yield from _line_blocks(path)
            else:
                yield _whole_file(path)


def parse_block(block: TextBlock, *, field: str) -> tuple[list[str], list[FileProblem]]:
    """Return the texts of a block and the records that are none, both in order."""
    texts: list[str] = []
    problems: list[FileProblem] = []
    for number, record in enumerate(block.records, start=block.first):
        try:
            texts.append(
                _text(record, form=block.form, field=field, too_long=number in block.too_long)
            )
        except _BadRecord as error:
            problems.append(FileProblem(block.path, block.form, number, str(error)))
    return texts, problems


def parse_objects(block: TextBlock) -> tuple[list[tuple[int, dict[str, Any]]], list[FileProblem]]:
    """Return the JSON objects of a block of lines or whole rows, each with its number, and the records that are none."""
    found: list[tuple[int, dict[str, Any]]] = []
    problems: list[FileProblem] = []
    for number, record in enumerate(block.records, start=block.first):
        try:
            if record is None or number in block.too_long:
                raise _BadRecord(f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB")
            found.append((number, _object(_decoded(record))))
        except _BadRecord as error:
            problems.append(FileProblem(block.path, block.form, number, str(error)))
    return found, problems


class _BadRecord(Exception):
    """The reason is worded without the record's content, so that records can be counted by it."""


def _text(record: bytes | None, *, form: Form, field: str, too_long: bool) -> str:
    if too_long:
        raise _BadRecord(f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB")
    if record is None:
        raise _BadRecord(f'column "{field}" is null')
    decoded = _decoded(record)
    text = _field_of(decoded, field) if form == "line" else decoded
    if not text:
        raise _BadRecord("empty text")
    return text


def _decoded(record: bytes) -> str:
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError:
        raise _BadRecord("not valid UTF-8") from None


def _object(line: str) -> dict[str, Any]:
    if not line.strip():
        raise _BadRecord("empty line")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise _BadRecord("not valid JSON") from None
    if not isinstance(value, dict):
        raise _BadRecord("not a JSON object")
    return value


def _field_of(line: str, field: str) -> str:
    value = _object(line)
    if field not in value:
        raise _BadRecord(f'no field "{field}"')
    text = value[field]
    if not isinstance(text, str):
        raise _BadRecord(f'field "{field}" is not a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800": legal in JSON, but no character
        raise _BadRecord(f'field "{field}" holds half a surrogate pair') from None
    return text


def _line_blocks(path: Path) -> Iterator[TextBlock]:
    first, size, records, too_long = 1, 0, cast("list[bytes | None]", []), set[int]()
    with _open(path) as file:
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number = first + len(records)
            if len(line) > MAX_DOCUMENT_BYTES:
                _skip_line(file, line)
                too_long.add(number)
                line = b""
            records.append(line.removeprefix(_BOM) if number == 1 else line)
            size += len(line)
            if size >= BLOCK_BYTES:
                yield TextBlock(str(path), "line", first, records, frozenset(too_long))
                first, size, records, too_long = number + 1, 0, [], set()
    if records:
        yield TextBlock(str(path), "line", first, records, frozenset(too_long))


def _skip_line(file: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(BLOCK_BYTES)


def _whole_file(path: Path) -> TextBlock:
    with _open(path) as file:
        text = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(text) > MAX_DOCUMENT_BYTES:
        return TextBlock(str(path), "file", 1, [None], frozenset([1]))
    return TextBlock(str(path), "file", 1, [text.removeprefix(_BOM)])


def _row_blocks(path: Path, field: str | None) -> Iterator[TextBlock]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if field is None:
            yield from _whole_rows(path, file)
            return
        kind = _text_column(path, file.schema_arrow, field)
        first = 1
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            # As bytes: decoding is left to parse_block, in another process.
            column = batch.column(0).cast(kind).cast(pa.large_binary())
            for records in _cut(column.to_pylist()):
                too_long = {
                    first + i
                    for i, r in enumerate(records)
                    if r is not None and len(r) > MAX_DOCUMENT_BYTES
                }
                yield TextBlock(str(path), "row", first, records, frozenset(too_long))
                first += len(records)


def _whole_rows(path: Path, file: Any) -> Iterator[TextBlock]:
    first = 1
    for batch in file.iter_batches(batch_size=256):
        for records in _cut([json.dumps(row, default=str).encode() for row in batch.to_pylist()]):
            yield TextBlock(str(path), "row", first, records)
            first += len(records)


def _text_column(path: Path, schema: Any, field: str) -> Any:
    """Return the column's type without its dictionary; DataError when it holds no text."""
    import pyarrow as pa

    if field not in schema.names:
        raise DataError(f'{path} has no column "{field}"; it has {", ".join(schema.names)}')
    kind = schema.field(field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        raise DataError(f'{path}: column "{field}" holds {kind}, not strings')
    return kind


def _cut(records: Sequence[bytes | None]) -> Iterator[list[bytes | None]]:
    """Cut records where BLOCK_BYTES are full."""
    start = size = 0
    for i, record in enumerate(records, start=1):
        size += len(record or b"")
        if size >= BLOCK_BYTES or i == len(records):
            yield list(records[start:i])
            start, size = i, 0


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed on the way."""
    if path.suffix in _COMPRESSED and not path.stat().st_size:
        raise EOFError(
            "it is empty, and even no text is some bytes when compressed"
        )  # gzip's reader takes it for no text
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            yield cast(BinaryIO, file)
    elif path.suffix == ".zst":
        import pyarrow as pa

        # Arrow's reader and not the zstandard package's: that one takes a file cut short for one that ends there.
        with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream, BLOCK_BYTES))
    else:
        with path.open("rb") as plain:
            yield plain


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn a damaged file into one sentence."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end: {error}") from error
    except ValueError as error:
        if type(error).__module__.startswith(
            "pyarrow"
        ):  # its errors of format; named so to leave it unimported
            raise DataError(f"{path} cannot be read to its end: {error}") from error
        raise


def is_supported(name: str) -> bool:
    """Whether files of this name (or pattern) are text that is read, by their kind."""
    return _form(Path(name)) is not None


def _form(path: Path) -> Form | None:
    """Return what a document is in this file, by its name; None for a kind that is not read."""
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    if suffix in _LINES:
        return "line"
    if suffix in _WHOLE:
        return "file"
    return "row" if path.suffix in _ROWS else None


def _check(files: list[Path]) -> None:
    seen: set[Path] = set()
    for path in files:
        if _form(path) is None:
            kinds = ", ".join((*_LINES, *_WHOLE, *_ROWS))
            raise DataError(
                f"{path} is of a kind that is not read; known are {kinds}, the text ones also .gz or .zst"
            )
        if path.resolve() in seen:
            raise DataError(f"{path} is named twice; its documents would count double")
        seen.add(path.resolve())


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)
