"""Training tasks: the data of a run, the head of its model, and its metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from megatrain.checkpoint.hf_metadata import Chat
from megatrain.config.loader import Config
from megatrain.config.schema import non_default
from megatrain.data.gpt_dataset import Samples, open_dataset
from megatrain.data.split import Part
from megatrain.data.text_files import is_supported
from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig, load_hf_config, read_config

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepRunner


CHAT_SETTINGS = ("chat_template", "train_on", "packing", "too_long")
"""Settings of `data` for conversations."""

SANITY_CHECK_SAMPLES = 32
"""Samples that `Task.sanity_check` reads."""


class DataSource(NamedTuple):
    """The samples of training or validation.

    Attributes:
        per_epoch: the number of samples of an epoch; None for blends, which have no epochs.
        notes: a line about each data set, for the log.
    """

    samples: Samples
    per_epoch: int | None = None
    notes: Sequence[str] = ()


class Task(Protocol):
    """A training task. Methods that most tasks share are implemented here."""

    def check(self, config: Config) -> None:
        """Raises ConfigError for missing settings, and for settings that have no effect."""

    def prepare(self, config: Config, which: Part) -> None:
        """Writes the files that `open` reads, in one process; fast if they exist already."""

    def architecture(self, config: Config) -> TransformerConfig:
        """Returns the config of the model, by default with a language model head."""
        return read_config(load_hf_config(config.model))

    def open(self, config: Config, architecture: TransformerConfig, which: Part) -> DataSource:
        """Opens the samples of training or validation.

        Raises:
            ConfigError, DataError: the data are missing, damaged or not of this model.
        """

    def sanity_check(self, config: Config, architecture: TransformerConfig, which: Part) -> None:
        """Checks quickly that the data can be read and fit the model, and writes no files.

        Raises:
            ConfigError, DataError: as `open`.
        """
        self.open(config, architecture, which)

    @contextlib.contextmanager
    def measure(self, runner: StepRunner, folder: Path) -> Iterator[dict[str, float]]:
        """Observes the evaluation in the block.

        Yields:
            A mapping that contains the task's metrics after the block, the same on all ranks.
        """
        yield {}

    def estimate_samples(
        self, config: Config, architecture: TransformerConfig
    ) -> DataSource | None:
        """Returns the training samples without writing files that stay; None if that is slow."""
        return self.open(config, architecture, "train")

    def chat(self, config: Config) -> Chat | None:
        """Returns the chat metadata of a saved model, if it has any."""


def text_file_error(config: Config, which: Part) -> ConfigError | None:
    """Returns the error if `data.train` or `data.valid` is a text file, which needs tokenizing."""
    path = getattr(config.data, which)
    if not isinstance(path, str) or not is_supported(path) or not Path(path).is_file():
        return None
    if Path(f"{path}.idx").exists():
        return None
    prefix = path
    while is_supported(prefix):
        prefix = str(Path(prefix).with_suffix(""))
    tokenizer = config.data.tokenizer or "TOKENIZER"
    return ConfigError(
        f"data.{which}",
        path,
        "must be an indexed dataset, not a text file",
        f"tokenize it once, then set data.{which}={prefix}",
        command=f"megatrain preprocess {path} --tokenizer {tokenizer} --output {prefix}",
    )


class PretrainingTask(Task):
    """Next-token prediction on sequences cut from the token stream of indexed datasets."""

    def check(self, config: Config) -> None:
        """Raises ConfigError for missing data, text files, and settings of finetuning."""
        settings = {f"data.{name}": name for name in non_default(config.data, CHAT_SETTINGS)}
        for setting, name in settings.items():
            raise ConfigError(
                setting,
                getattr(config.data, name),
                "requires `megatrain finetune`",
                "start this config with that command, or remove the setting",
                fix={setting: getattr(type(config.data)(), name)},
            )
        if config.task != "sft":
            raise ConfigError(
                "task",
                config.task,
                "requires `megatrain finetune`",
                "start this config with that command, or remove the setting",
                fix={"task": "sft"},
            )
        if config.train.epochs is not None:
            raise ConfigError(
                "train.epochs",
                config.train.epochs,
                "requires `megatrain finetune`, which counts samples",
                "set train.steps or train.tokens",
                fix={"train.epochs": None, "train.steps": 1000},
            )
        for error in (text_file_error(config, "train"), text_file_error(config, "valid")):
            if error is not None:
                raise error

    def prepare(self, config: Config, which: Part) -> None:
        """Writes nothing: `megatrain preprocess` has written the files."""

    def open(self, config: Config, architecture: TransformerConfig, which: Part) -> DataSource:
        """Opens the samples of `data.train` or `data.valid`."""
        if config.data.train is None:
            raise ConfigError(
                "data.train",
                None,
                "must be set",
                "give the prefix that `megatrain preprocess --output` wrote",
            )
        return DataSource(
            open_dataset(
                config.data,
                part=which,
                sequence_length=config.data.sequence_length,
                seed=config.run.seed,
                vocab_size=architecture.vocab_size,
            )
        )

    def sanity_check(self, config: Config, architecture: TransformerConfig, which: Part) -> None:
        """Reads samples from all over the files, to find tokens outside the vocabulary."""
        samples = self.open(config, architecture, which).samples
        for position in range(SANITY_CHECK_SAMPLES):
            samples.fetch(position)

    def chat(self, config: Config) -> Chat | None:
        """Returns None: pretraining knows no chats."""
        return None
