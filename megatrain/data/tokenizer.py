"""Train a tokenizer, and ask one for what preprocessing needs.

Byte-level BPE as in GPT-2: 256 bytes are the alphabet, so that any text can be written and there is no unknown token.
`<|endoftext|>` ends a document, and is what generation stops at and starts from. There is no padding token: one that
doubles as the end of a text gets masked with the padding, and the model never learns to stop.
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
_LARGEST = 10_000_000  # the library reserves memory for all of them before it looks at a text


class TrainedTokenizer(NamedTuple):
    """What `train_tokenizer` made."""

    folder: Path
    vocab_size: int  # less than asked for where the text has no more pairs to merge
    documents: int


def train_tokenizer(
    inputs: Sequence[str | Path],
    *,
    vocab_size: int,
    output: str | Path,
    field: str = "text",
    special_tokens: Sequence[str] = (),
) -> TrainedTokenizer:
    """Train on all documents of `inputs` and save a folder that AutoTokenizer.from_pretrained loads.

    `special_tokens` are further tokens that are never split, such as those of a chat format. Raises ConfigError for a
    vocabulary too small for bytes and special tokens, and DataError for a bad document.
    """
    special = list(dict.fromkeys([END_OF_TEXT, *special_tokens]))
    if vocab_size < _ALPHABET + len(special):
        rule = f"must be at least {_ALPHABET + len(special)}: {_ALPHABET} bytes and {', '.join(special)}"
        raise ConfigError("--vocab-size", vocab_size, rule)
    if vocab_size > _LARGEST:
        raise ConfigError("--vocab-size", vocab_size, f"is more than {_LARGEST:,}")
    if "" in special:
        raise ConfigError("--special-token", "''", "is no token")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = find_inputs(inputs)
    with _explained(Path(output)):
        Path(output).mkdir(parents=True, exist_ok=True)  # before the minutes that training can take
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(found, field)
    tokenizer.train_from_iterator(counted.texts(), trainer=trainer)
    if not counted.documents:
        raise DataError(f"{', '.join(map(str, inputs))}: there are no documents to train on")
    _save(tokenizer, Path(output), special_tokens=special[1:])
    return TrainedTokenizer(Path(output), tokenizer.get_vocab_size(), counted.documents)


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer in `folder`, a transformers.PreTrainedTokenizerFast; DataError when there is none."""
    if not Path(folder).exists():
        raise DataError(f"{folder} does not exist, and a tokenizer was to be loaded from it")
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder, and a tokenizer was to be loaded from it")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of a damaged file the tokenizers library raises no other kind
        raise DataError(f"{folder} {describe_load_error(folder, error)}") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {folder} has no tokenizer.json; only fast tokenizers are used"
        )
    return tokenizer


def describe_load_error(folder: str | Path, error: Exception) -> str:
    """What is wrong with a folder that transformers could load no tokenizer from."""
    if not any(
        any(Path(folder).glob(pattern)) for pattern in ("tokenizer*.json", "vocab.*", "*.model")
    ):
        return "is no tokenizer's folder: it has no tokenizer.json"
    return f"holds no tokenizer that transformers can load ({type(error).__name__}: {' '.join(str(error).split())})"


def end_of_document_id(tokenizer: Any) -> int:
    """Return the id that ends each document: the tokenizer's end of sequence, as Megatron-LM has it."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {tokenizer.name_or_path} has no end-of-sequence token to end documents with"
        )
    return int(tokenizer.eos_token_id)


class _Counted:
    """The texts of all inputs; the trainer takes an iterator and does not say how many it saw."""

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
    with _explained(folder):
        fast.save_pretrained(str(folder))


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error
