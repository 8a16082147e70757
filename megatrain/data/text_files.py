"""Input files of text: which files to read, and their cutting into blocks of raw records.

| file                                  | one document is                           |
|---------------------------------------|-------------------------------------------|
| .jsonl .ndjson .json (.gz, .zst)      | one line, an object with a text field     |
| .txt (.gz, .zst)                      | the whole file                            |
| .parquet                              | one row, its text column                  |

`records.py` parses the blocks, in many processes if there are many files. Memory is bounded by the
size of a block and by the largest document, at most MAX_DOCUMENT_BYTES.
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
from typing import Any, BinaryIO, NamedTuple, cast

from megatrain.data.records import MAX_DOCUMENT_BYTES, Form, TextBlock
from megatrain.errors import DataError

BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_FORMS: dict[str, Form] = {
    ".jsonl": "line",
    ".ndjson": "line",
    ".json": "line",
    ".txt": "file",
    ".parquet": "row",
}
_COMPRESSED = (".gz", ".zst")


class InputFiles(NamedTuple):
    """The files to read, in order, and what was left out of folders.

    Attributes:
        files: files of known formats.
        ignored: files of other formats, and links to folders, which are not followed.
    """

    files: list[Path]
    ignored: list[Path]


def find_inputs(inputs: Sequence[str | Path]) -> InputFiles:
    """Returns the files that files, folders (recursively) and globs name.

    The order is that of `inputs`; files of a folder or a glob are sorted by name.

    Raises:
        DataError: an input names no file of text, or a file is named twice.
    """
    files: list[Path] = []
    ignored: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            # A link to a missing file counts as a file: reading it reports the loss.
            content = sorted(
                p
                for p in path.rglob("*")
                if (p.is_file() or p.is_symlink()) and not _is_hidden(p.relative_to(path))
            )
            found = [p for p in content if _form(p) is not None and not p.is_dir()]
            ignored += [p for p in content if _form(p) is None or p.is_dir()]
        elif path.is_file():
            found = [path]
        else:
            found = sorted(map(Path, glob.glob(str(name), recursive=True)))
        if not found:
            raise DataError(f"{name} {_missing_reason(name)}")
        files += found
    _check_files(files)
    return InputFiles(files, ignored)


def is_supported(name: str) -> bool:
    """Returns True if files of this name or pattern are text files that can be read."""
    return _form(Path(name)) is not None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _missing_reason(name: str | Path) -> str:
    if Path(name).exists():
        return f"contains no text files (supported: {', '.join(_FORMS)})"
    return "matches no file" if glob.has_magic(str(name)) else "does not exist"


def _check_files(files: list[Path]) -> None:
    seen: set[Path] = set()
    for path in files:
        if _form(path) is None:
            raise DataError(
                f"{path} has a format that is not supported (supported: {', '.join(_FORMS)}; "
                f"JSON and text also as {' or '.join(_COMPRESSED)})"
            )
        if path.resolve() in seen:
            raise DataError(f"{path} is named twice; its documents would be read twice")
        seen.add(path.resolve())


def _form(path: Path) -> Form | None:
    if path.suffix not in _COMPRESSED:
        return _FORMS.get(path.suffix)
    form = _FORMS.get(Path(path.stem).suffix)
    return None if form == "row" else form


def read_blocks(files: Sequence[Path], *, field: str | None) -> Iterator[TextBlock]:
    """Yields the records of all files in order, in blocks of about BLOCK_BYTES.

    Args:
        files: the files, from `find_inputs`.
        field: the text column of parquet files. With None a record is a whole row as JSON.

    Raises:
        DataError: a file is truncated or damaged, or its text column is missing.
    """
    for path in files:
        with _explain_errors(path):
            form = _form(path)
            if form == "row":
                yield from _row_blocks(path, field)
            elif form == "line":
                yield from _line_blocks(path)
            else:
                yield _file_block(path)


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


def _file_block(path: Path) -> TextBlock:
    with _open(path) as file:
        text = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(text) > MAX_DOCUMENT_BYTES:
        return TextBlock(str(path), "file", 1, [None], frozenset([1]))
    return TextBlock(str(path), "file", 1, [text.removeprefix(_BOM)])


def _row_blocks(path: Path, field: str | None) -> Iterator[TextBlock]:
    import pyarrow.parquet as pq

    first = 1
    with pq.ParquetFile(path) as file:
        records_of_batches = _json_rows(file) if field is None else _column(path, file, field)
        for batch in records_of_batches:
            for records in _cut_into_blocks(batch):
                too_long = frozenset(
                    number
                    for number, record in enumerate(records, start=first)
                    if field is not None and record and len(record) > MAX_DOCUMENT_BYTES
                )
                yield TextBlock(str(path), "row", first, records, too_long)
                first += len(records)


def _json_rows(file: Any) -> Iterator[list[bytes | None]]:
    for batch in file.iter_batches(batch_size=256):
        yield [json.dumps(row, default=str).encode() for row in batch.to_pylist()]


def _column(path: Path, file: Any, field: str) -> Iterator[list[bytes | None]]:
    import pyarrow as pa

    text_type = _text_type(path, file.schema_arrow, field)
    for batch in file.iter_batches(batch_size=256, columns=[field]):
        # Bytes: `parse_texts` decodes them, in another process.
        yield batch.column(0).cast(text_type).cast(pa.large_binary()).to_pylist()


def _text_type(path: Path, schema: Any, field: str) -> Any:
    """Returns the type of a text column, without its dictionary encoding."""
    import pyarrow as pa

    if field not in schema.names:
        raise DataError(f'{path} has no column "{field}"; it has {", ".join(schema.names)}')
    found = schema.field(field).type
    found = found.value_type if pa.types.is_dictionary(found) else found
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(found) for check in is_text):
        raise DataError(f'{path}: column "{field}" must contain strings; it contains {found}')
    return found


def _cut_into_blocks(records: Sequence[bytes | None]) -> Iterator[list[bytes | None]]:
    start = size = 0
    for stop, record in enumerate(records, start=1):
        size += len(record or b"")
        if size >= BLOCK_BYTES or stop == len(records):
            yield list(records[start:stop])
            start, size = stop, 0


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading and decompresses it."""
    if path.suffix in _COMPRESSED and not path.stat().st_size:
        # gzip reads zero bytes as an empty text, but compressing one gives some bytes.
        raise EOFError("it is empty, so the compressed data are missing")
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            yield cast(BinaryIO, file)
    elif path.suffix == ".zst":
        import pyarrow as pa

        # Not the zstandard package: its reader takes a truncated file for a complete one.
        with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream, BLOCK_BYTES))
    else:
        with path.open("rb") as plain:
            yield plain


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Raises DataError in place of the errors of a truncated or damaged file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end: {error}") from error
    except ValueError as error:
        # pyarrow's format errors, found by name because pyarrow may not be imported.
        if type(error).__module__.startswith("pyarrow"):
            raise DataError(f"{path} cannot be read to its end: {error}") from error
        raise
