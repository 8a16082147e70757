"""Training and loading of tokenizers.

Byte-level BPE as in GPT-2. Its alphabet are the 256 bytes, so any text can be encoded without an
unknown token. `<|endoftext|>` ends documents; generation starts from it and stops at it. No padding
token is set: if it were `<|endoftext|>`, the loss mask of padding would also hide the end of texts,
and the model would not learn to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.data.records import parse_texts
from megatrain.data.text_files import InputFiles, find_inputs, read_blocks
from megatrain.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
_ALPHABET = 256
_MAX_VOCAB_SIZE = 10_000_000
"""The library allocates memory for the vocabulary before it reads a text."""


class TrainedTokenizer(NamedTuple):
    """The result of `train_tokenizer`.

    Attributes:
        folder: the folder of the tokenizer.
        vocab_size: the size of the vocabulary. It is smaller than requested if the texts have no
            more pairs to merge.
        documents: the number of documents trained on.
    """

    folder: Path
    vocab_size: int
    documents: int


def train_tokenizer(
    inputs: Sequence[str | Path],
    *,
    vocab_size: int,
    output: str | Path,
    field: str = "text",
    special_tokens: Sequence[str] = (),
) -> TrainedTokenizer:
    """Trains a tokenizer and saves a folder that AutoTokenizer.from_pretrained loads.

    Args:
        inputs: files, folders and globs; see `text_files.py` for the formats.
        vocab_size: the size of the vocabulary.
        output: the folder to write.
        field: the field or column that contains the text.
        special_tokens: further tokens that are never split, such as those of a chat template.

    Raises:
        ConfigError: the vocabulary is too small for bytes and special tokens, or too large.
        DataError: a record is not a document, or the folder cannot be written.
    """
    special = list(dict.fromkeys([END_OF_TEXT, *special_tokens]))
    _check_vocabulary(vocab_size, special)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = find_inputs(inputs)
    with _explain_errors(Path(output)):  # before training, which can take minutes
        Path(output).mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _CountedTexts(found, field)
    tokenizer.train_from_iterator(counted.texts(), trainer=trainer)
    if not counted.documents:
        raise DataError(f"{', '.join(map(str, inputs))}: there are no documents to train on")
    _save(tokenizer, Path(output), special_tokens=special[1:])
    return TrainedTokenizer(Path(output), tokenizer.get_vocab_size(), counted.documents)


def _check_vocabulary(vocab_size: int, special: list[str]) -> None:
    smallest = _ALPHABET + len(special)
    if "" in special:
        raise ConfigError("--special-token", "''", "must not be empty", "remove it")
    if vocab_size < smallest:
        raise ConfigError(
            "--vocab-size",
            vocab_size,
            f"must be at least {smallest}: {_ALPHABET} bytes and {', '.join(special)}",
            fix={"--vocab-size": smallest},
        )
    if vocab_size > _MAX_VOCAB_SIZE:
        raise ConfigError(
            "--vocab-size",
            vocab_size,
            f"must be at most {_MAX_VOCAB_SIZE:,}",
            fix={"--vocab-size": _MAX_VOCAB_SIZE},
        )


def load_tokenizer(folder: str | Path) -> Any:
    """Returns the tokenizer in `folder`, a transformers.PreTrainedTokenizerFast.

    Raises:
        DataError: the folder contains no fast tokenizer.
    """
    if not Path(folder).is_dir():
        problem = "is not a folder" if Path(folder).exists() else "does not exist"
        raise DataError(f"{folder} {problem}; give the folder of a tokenizer")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files raise plain Exception
        raise DataError(f"{folder} {describe_load_error(folder, error)}") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {folder} has no tokenizer.json; only fast tokenizers are supported"
        )
    return tokenizer


def describe_load_error(folder: str | Path, error: Exception) -> str:
    """Returns the reason why transformers cannot load a tokenizer from a folder."""
    patterns = ("tokenizer*.json", "vocab.*", "*.model")
    if not any(any(Path(folder).glob(pattern)) for pattern in patterns):
        return "is not the folder of a tokenizer: it has no tokenizer.json"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"contains a tokenizer that transformers cannot load ({reason})"


def end_of_document_id(tokenizer: Any) -> int:
    """Returns the token that ends documents: the end of sequence, as in Megatron-LM."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {tokenizer.name_or_path} has no end-of-sequence token, "
            "which ends documents"
        )
    return int(tokenizer.eos_token_id)


class _CountedTexts:
    """The texts of all inputs, and their number, which the trainer does not count."""

    def __init__(self, inputs: InputFiles, field: str) -> None:
        self._inputs, self._field, self.documents = inputs, field, 0

    def texts(self) -> Iterator[list[str]]:
        for block in read_blocks(self._inputs.files, field=self._field):
            texts, problems = parse_texts(block, field=self._field)
            if problems:
                raise DataError(str(problems[0]))
            self.documents += len(texts)
            yield texts


def _save(tokenizer: Any, folder: Path, *, special_tokens: list[str]) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        additional_special_tokens=special_tokens,
    )
    with _explain_errors(folder):
        fast.save_pretrained(str(folder))


@contextmanager
def _explain_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error
