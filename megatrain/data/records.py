"""Raw records of text files, and their conversion to texts or JSON objects.

`text_files.py` cuts files into blocks of raw records. The functions here parse a block, in worker
processes because it is expensive. They report every record that is not a document.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

MAX_DOCUMENT_BYTES = 128 << 20
"""Longest document. The tokenizer takes about thirty times as much memory while it encodes one."""

Form = Literal["line", "file", "row"]
"""The part of a file that is one record, as error messages name it."""

Parsed = TypeVar("Parsed")


class TextBlock(NamedTuple):
    """Consecutive raw records of one file.

    Attributes:
        path: the file.
        form: the part of the file that is one record.
        first_number: the number of the first record in the file, from 1.
        records: the bytes of each record. None is a null in a parquet column, or a file that is
            too long.
        too_long: the numbers of records longer than MAX_DOCUMENT_BYTES, whose bytes were dropped.
    """

    path: str
    form: Form
    first_number: int
    records: list[bytes | None]
    too_long: frozenset[int] = frozenset()


class RecordProblem(NamedTuple):
    """A record that is not a document, and the reason."""

    path: str
    form: Form
    number: int
    reason: str

    def __str__(self) -> str:
        location = self.path if self.form == "file" else f"{self.path}, {self.form} {self.number}"
        return f"{location}: {self.reason}"


class _InvalidRecord(Exception):
    """The reason does not quote the record, so that records can be counted by reason."""


def parse_texts(block: TextBlock, *, field: str) -> tuple[list[str], list[RecordProblem]]:
    """Returns the texts of a block and the records without one, both in order.

    `field` is the field of a JSON line that holds the text.
    """
    texts, problems = _parse(block, lambda record: _text(record, form=block.form, field=field))
    return [text for _, text in texts], problems


def parse_objects(block: TextBlock) -> tuple[list[tuple[int, dict[str, Any]]], list[RecordProblem]]:
    """Returns the JSON objects of a block with their numbers, and the records that are not objects.

    The block must hold lines, or rows as JSON (`read_blocks` with `field=None`).
    """
    return _parse(block, lambda record: _object(_decode(record or b"")))


def _parse(
    block: TextBlock, convert: Callable[[bytes | None], Parsed]
) -> tuple[list[tuple[int, Parsed]], list[RecordProblem]]:
    parsed: list[tuple[int, Parsed]] = []
    problems: list[RecordProblem] = []
    for number, record in enumerate(block.records, start=block.first_number):
        try:
            if number in block.too_long:
                raise _InvalidRecord(f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB")
            parsed.append((number, convert(record)))
        except _InvalidRecord as error:
            problems.append(RecordProblem(block.path, block.form, number, str(error)))
    return parsed, problems


def _text(record: bytes | None, *, form: Form, field: str) -> str:
    if record is None:
        raise _InvalidRecord(f'column "{field}" is null')
    decoded = _decode(record)
    text = _text_field(_object(decoded), field) if form == "line" else decoded
    if not text:
        raise _InvalidRecord("empty text")
    return text


def _decode(record: bytes) -> str:
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError:
        raise _InvalidRecord("not valid UTF-8") from None


def _object(line: str) -> dict[str, Any]:
    if not line.strip():
        raise _InvalidRecord("empty line")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise _InvalidRecord("not valid JSON") from None
    if not isinstance(value, dict):
        raise _InvalidRecord("not a JSON object")
    return value


def _text_field(value: dict[str, Any], field: str) -> str:
    if field not in value:
        raise _InvalidRecord(f'no field "{field}"')
    text = value[field]
    if not isinstance(text, str):
        raise _InvalidRecord(f'field "{field}" is not a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is legal in JSON, but not a character
        raise _InvalidRecord(f'field "{field}" contains an unpaired surrogate') from None
    return text
