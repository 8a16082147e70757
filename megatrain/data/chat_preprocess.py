"""Chat files to a prepared data set: tokens and what is learnt of them, once, in the run's folder.

    read_blocks --> workers.py: parse, render, tokenise, cut --> IndexedWriter

The files may be larger than memory; what is kept of each chat is its length. The name holds a fingerprint of the files,
the tokenizer and the settings, so that a run that is started again finds its data, and a changed one makes its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np

from megatrain.data.chat_format import BadSample, read_conversation
from megatrain.data.chat_template import ChatTemplate, Encoded, TrainOn
from megatrain.data.indexed_dataset import IndexedWriter
from megatrain.data.preference_dataset import read_pair
from megatrain.data.records import RecordProblem, TextBlock, parse_objects
from megatrain.data.sft_dataset import encode_loss_mask
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.data.worker_processes import map_blocks
from megatrain.errors import DataError
from megatrain.files import write_atomically
from megatrain.progress import progress_bar

TooLong = Literal["truncate", "skip", "error"]

_FORMAT = 1
_ONE_PROCESS_BYTES = 8 << 20  # further processes take seconds to start


class SFTSpec(NamedTuple):
    """What makes chats into tokens."""

    tokenizer: str
    chat_template: str | None
    train_on: TrainOn
    too_long: TooLong
    sequence_length: int
    pairs: bool = False


@dataclass
class Counts:
    """What became of the chats of the files."""

    samples: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    skipped: int = 0
    emptied: int = 0
    """Cut before anything that would be learnt, and left out."""


class EncodedChats(NamedTuple):
    """The chats of one block, `coded` and end to end."""

    codes: np.ndarray[Any, np.dtype[np.int64]]
    lengths: list[int]
    counts: Counts
    problems: list[RecordProblem]
    num_bytes: int


def prepare_data(
    path: str, recipe: SFTSpec, *, folder: Path, name: str, progress: TextIO | None = None
) -> Path:
    """Return the prefix of the prepared data of `path` (a file, folder or glob), made now unless it is there already.

    Raises DataError at the first record that cannot be learnt from, with its file and line.
    """
    files = find_inputs([path]).files
    prefix = folder / f"{name}-{fingerprint(files, recipe)}"
    if not is_prepared(prefix):
        counts = _make(files, recipe, prefix, progress)
        for old in folder.glob(f"{name}-*"):
            if not old.name.startswith(prefix.name):
                old.unlink()
        # Written last: it marks the data as complete.
        with write_atomically(_counts_file(prefix)) as file:
            file.write_text(json.dumps(asdict(counts)), encoding="utf-8")
    return prefix


def read_counts(prefix: Path) -> Counts:
    """What `prepare` counted."""
    try:
        return Counts(**json.loads(_counts_file(prefix).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{_counts_file(prefix)} cannot be read ({error}); delete it and start again"
        ) from None


def find_prepared(path: str, recipe: SFTSpec, *, folder: Path, name: str) -> Path:
    """The prefix that `prepare` returns for the same arguments."""
    return folder / f"{name}-{fingerprint(find_inputs([path]).files, recipe)}"


def is_prepared(prefix: Path) -> bool:
    """Whether the data are there, and whole."""
    return _counts_file(prefix).exists()


def fingerprint(files: Sequence[Path], recipe: SFTSpec) -> str:
    """Of everything the prepared data depend on; of the chat files names, sizes and times, not every byte."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((_FORMAT, recipe)).encode())
    for file in files:
        state = file.stat()
        digest.update(repr((str(file.resolve()), state.st_size, state.st_mtime_ns)).encode())
    small = [
        path
        for pattern in ("*token*.json", "chat_template*")
        for path in sorted(Path(recipe.tokenizer).glob(pattern))
    ]
    for file in [*small, *([Path(recipe.chat_template)] if recipe.chat_template else [])]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def make_encoder(recipe: SFTSpec) -> Callable[[TextBlock], EncodedChats]:
    """Return a function that encodes blocks in this process, on one core."""
    template = ChatTemplate(recipe.tokenizer, file=recipe.chat_template)

    def encode(block: TextBlock) -> EncodedChats:
        records, problems = parse_objects(block)
        counts = Counts()
        chats = []
        for number, record in records:
            try:
                chats += _encode(record, template, recipe, counts)
            except BadSample as error:
                problems.append(RecordProblem(block.path, block.form, number, str(error)))
        codes = np.concatenate(chats) if chats else np.empty(0, dtype=np.int64)
        problems.sort(key=lambda problem: problem.number)
        return EncodedChats(
            codes,
            [len(chat) for chat in chats],
            counts,
            problems,
            sum(len(r or b"") for r in block.records),
        )

    return encode


def encode_record(record: dict[str, Any], template: ChatTemplate, recipe: SFTSpec) -> list[Encoded]:
    """The record's chat, or the two of a pair, as tokens, however long."""
    if recipe.pairs:
        return [template.encode(chat, train_on="completion") for chat in read_pair(record)]
    return [template.encode(read_conversation(record), train_on=recipe.train_on)]


def _encode(
    record: dict[str, Any], template: ChatTemplate, recipe: SFTSpec, counts: Counts
) -> list[Any]:
    """The record `coded` and counted: one chat, of a pair two; none where it is left out."""
    chats = encode_record(record, template, recipe)
    most = recipe.sequence_length + 1
    longest = max(len(tokens) for tokens, _ in chats)
    if longest > most:
        if recipe.too_long == "error":
            rule = f"takes {longest - 1} places and data.sequence_length={recipe.sequence_length}"
            raise BadSample(f"{rule}; data.too_long=truncate or skip goes on")
        if recipe.too_long == "skip":
            counts.skipped += 1
            return []
        chats = [Encoded(tokens[:most], trained[:most]) for tokens, trained in chats]
        if not all(trained[1:].any() for _, trained in chats):
            counts.emptied += 1
            return []
        counts.cut += 1
    counts.samples += 1
    counts.tokens += sum(len(tokens) for tokens, _ in chats)
    counts.trained += sum(int(trained[1:].sum()) for _, trained in chats)
    return [encode_loss_mask(tokens, trained) for tokens, trained in chats]


def _make(files: list[Path], recipe: SFTSpec, prefix: Path, progress: TextIO | None) -> Counts:
    template = ChatTemplate(
        recipe.tokenizer, file=recipe.chat_template
    )  # what is wrong with it is said before any process starts
    num_bytes = sum(file.stat().st_size for file in files)
    workers = 1 if num_bytes < _ONE_PROCESS_BYTES else len(os.sched_getaffinity(0))
    total = Counts()
    with (
        progress_bar(None, unit="B", description="prepare chats", stream=progress) as bar,
        IndexedWriter(prefix, vocab_size=2 * len(template.tokenizer)) as writer,
    ):
        for encoded in map_blocks(
            read_blocks(files, field=None), make_encoder, recipe, workers=workers
        ):
            if encoded.problems:
                raise DataError(str(encoded.problems[0]))
            writer.add_documents(encoded.codes, lengths=encoded.lengths)
            total = Counts(
                **{
                    key: value + getattr(encoded.counts, key)
                    for key, value in asdict(total).items()
                }
            )
            bar.set_postfix_str(f"{writer.num_tokens / 1e6:,.1f}M tokens", refresh=False)
            bar.update(encoded.num_bytes)
        if not total.samples:
            raise DataError(
                f"{files[0]}: all {total.skipped + total.emptied} samples are longer than "
                f"data.sequence_length={recipe.sequence_length} and nothing is left to learn"
            )
    return total


def _counts_file(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.json")
