"""Preparation of chat files: tokens and loss masks, written once to the run's folder.

    read_blocks --> worker_processes.py: parse, render, tokenize, truncate --> IndexedWriter

The files may be larger than memory; only the length of each chat is kept. The name of the prepared
data contains a fingerprint of the files, the tokenizer and the settings. A restarted run finds its
data by it, and changed settings lead to new data.
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
from megatrain.data.chat_template import ChatTemplate, EncodedChat, TrainOn
from megatrain.data.indexed_dataset import IndexedWriter
from megatrain.data.preference_dataset import read_pair
from megatrain.data.records import RecordProblem, TextBlock, parse_objects
from megatrain.data.sft_dataset import Int64, encode_loss_mask
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.data.worker_processes import map_blocks
from megatrain.errors import DataError
from megatrain.files import write_atomically
from megatrain.progress import progress_bar

TooLong = Literal["truncate", "skip", "error"]

_FORMAT = 1
_ONE_PROCESS_BYTES = 8 << 20
"""Files up to this size are prepared in one process; the start of more takes seconds."""


class SFTSpec(NamedTuple):
    """The settings that determine the tokens and loss masks of chats."""

    tokenizer: str
    chat_template: str | None
    train_on: TrainOn
    too_long: TooLong
    sequence_length: int
    pairs: bool = False


@dataclass
class Counts:
    """The result of a preparation. The field names are the keys of its JSON file.

    Attributes:
        samples: the chats or pairs that were written.
        tokens: their tokens.
        trained: their tokens with a loss.
        cut: samples that were truncated.
        skipped: samples that were too long and left out.
        emptied: samples without a loss after truncation, which were left out.
    """

    samples: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    skipped: int = 0
    emptied: int = 0

    def __add__(self, other: Counts) -> Counts:
        sums = {key: value + getattr(other, key) for key, value in asdict(self).items()}
        return Counts(**sums)


class EncodedBlock(NamedTuple):
    """The chats of one block.

    Attributes:
        codes: tokens with loss masks, see `encode_loss_mask`, of all chats.
        lengths: the length of each chat.
        counts: the counts of the block.
        problems: the records that are not valid, in order.
        num_bytes: the size of the records.
    """

    codes: Int64
    lengths: list[int]
    counts: Counts
    problems: list[RecordProblem]
    num_bytes: int


def prepare_data(
    path: str, spec: SFTSpec, *, folder: Path, name: str, progress: TextIO | None = None
) -> Path:
    """Prepares the chats of a file, folder or glob unless it was done; returns their prefix.

    Prepared data of the same name with another fingerprint are deleted.

    Raises:
        DataError: the first record that cannot be trained on, with file and line.
    """
    files = find_inputs([path]).files
    prefix = folder / f"{name}-{fingerprint(files, spec)}"
    if not is_prepared(prefix):
        counts = _prepare(files, spec, prefix, progress)
        for old in folder.glob(f"{name}-*"):
            if not old.name.startswith(prefix.name):
                old.unlink()
        # Written last: it marks the data as complete.
        with write_atomically(_counts_file(prefix)) as file:
            file.write_text(json.dumps(asdict(counts)), encoding="utf-8")
    return prefix


def find_prepared(path: str, spec: SFTSpec, *, folder: Path, name: str) -> Path:
    """Returns the prefix that `prepare_data` returns for the same arguments."""
    return folder / f"{name}-{fingerprint(find_inputs([path]).files, spec)}"


def is_prepared(prefix: Path) -> bool:
    """Returns True if the prepared data exist and are complete."""
    return _counts_file(prefix).exists()


def read_counts(prefix: Path) -> Counts:
    """Returns the counts of prepared data."""
    path = _counts_file(prefix)
    try:
        return Counts(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); delete it and restart", command=f"rm {path}"
        ) from None


def fingerprint(files: Sequence[Path], spec: SFTSpec) -> str:
    """Returns a hash of all that prepared data depend on.

    Chat files enter with their names, sizes and modification times, not with every byte.
    """
    digest = hashlib.blake2b(digest_size=8)
    # Do not change this text: runs find the data that they prepared earlier by it.
    fields = ", ".join(f"{name}={value!r}" for name, value in spec._asdict().items())
    digest.update(f"({_FORMAT}, Recipe({fields}))".encode())
    for file in files:
        state = file.stat()
        digest.update(repr((str(file.resolve()), state.st_size, state.st_mtime_ns)).encode())
    patterns = ("*token*.json", "chat_template*")
    small = [path for glob in patterns for path in sorted(Path(spec.tokenizer).glob(glob))]
    for file in [*small, *([Path(spec.chat_template)] if spec.chat_template else [])]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def make_encoder(spec: SFTSpec) -> Callable[[TextBlock], EncodedBlock]:
    """Returns a function that encodes blocks in this process, on one core."""
    template = ChatTemplate(spec.tokenizer, file=spec.chat_template)

    def encode(block: TextBlock) -> EncodedBlock:
        records, problems = parse_objects(block)
        counts = Counts()
        chats: list[Int64] = []
        for number, record in records:
            try:
                chats += _encode(record, template, spec, counts)
            except BadSample as error:
                problems.append(RecordProblem(block.path, block.form, number, str(error)))
        problems.sort(key=lambda problem: problem.number)
        codes = np.concatenate(chats) if chats else np.empty(0, dtype=np.int64)
        num_bytes = sum(len(record or b"") for record in block.records)
        return EncodedBlock(codes, [len(chat) for chat in chats], counts, problems, num_bytes)

    return encode


def encode_record(
    record: dict[str, Any], template: ChatTemplate, spec: SFTSpec
) -> list[EncodedChat]:
    """Returns the chat of a record, or the two of a pair, with all their tokens."""
    if spec.pairs:
        return [template.encode(chat, train_on="completion") for chat in read_pair(record)]
    return [template.encode(read_conversation(record), train_on=spec.train_on)]


def _encode(
    record: dict[str, Any], template: ChatTemplate, spec: SFTSpec, counts: Counts
) -> list[Int64]:
    """Encodes and counts a record; returns an empty list if it is left out."""
    chats = encode_record(record, template, spec)
    max_tokens = spec.sequence_length + 1
    longest = max(len(chat.tokens) for chat in chats)
    if longest > max_tokens:
        if spec.too_long == "error":
            raise BadSample(
                f"takes {longest - 1} places, but data.sequence_length={spec.sequence_length}; "
                "data.too_long=truncate or skip allows such samples"
            )
        if spec.too_long == "skip":
            counts.skipped += 1
            return []
        chats = [
            EncodedChat(chat.tokens[:max_tokens], chat.loss_mask[:max_tokens]) for chat in chats
        ]
        if not all(chat.loss_mask[1:].any() for chat in chats):
            counts.emptied += 1
            return []
        counts.cut += 1
    counts.samples += 1
    counts.tokens += sum(len(chat.tokens) for chat in chats)
    counts.trained += sum(int(chat.loss_mask[1:].sum()) for chat in chats)
    return [encode_loss_mask(*chat) for chat in chats]


def _prepare(files: list[Path], spec: SFTSpec, prefix: Path, progress: TextIO | None) -> Counts:
    # Loaded first, so that its errors are raised before any process starts.
    template = ChatTemplate(spec.tokenizer, file=spec.chat_template)
    num_bytes = sum(file.stat().st_size for file in files)
    workers = 1 if num_bytes < _ONE_PROCESS_BYTES else len(os.sched_getaffinity(0))
    total = Counts()
    with (
        progress_bar(None, unit="B", description="prepare chats", stream=progress) as bar,
        IndexedWriter(prefix, vocab_size=2 * len(template.tokenizer)) as writer,
    ):
        blocks = read_blocks(files, field=None)
        for encoded in map_blocks(blocks, make_encoder, spec, workers=workers):
            if encoded.problems:
                raise DataError(str(encoded.problems[0]))
            writer.add_documents(encoded.codes, lengths=encoded.lengths)
            total += encoded.counts
            bar.set_postfix_str(f"{writer.num_tokens / 1e6:,.1f}M tokens", refresh=False)
            bar.update(encoded.num_bytes)
        if not total.samples:
            raise DataError(
                f"{files[0]}: all {total.skipped + total.emptied} samples are longer than "
                f"data.sequence_length={spec.sequence_length}; no tokens with a loss remain"
            )
    return total


def _counts_file(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.json")
