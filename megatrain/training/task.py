"""What a run learns from: pretraining's indexed datasets, or finetuning's chats, pairs of answers or labels. The loop around them is one.

A task says which settings it uses, makes what has to be made from the data before a rank starts, and opens samples.
"""

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


OF_CHATS = ("chat_template", "train_on", "packing", "too_long")
"""Settings of `data` that are about conversations."""


GLANCES = 32
"""Samples that are looked at beforehand."""


class DataSource(NamedTuple):
    """Samples, how many are an epoch (None where they have no count of their own, as those of a blend), and what to say."""

    samples: Samples
    per_epoch: int | None = None
    words: Sequence[str] = ()


class Task(Protocol):
    """What a verb trains on. What most tasks do alike is written here, and inherited."""

    def check(self, config: Config) -> None:
        """Refuse settings that the task does not use."""

    def prepare(self, config: Config, which: Part) -> None:
        """Make what `open` reads, in one process and before any rank needs it; quick where it is there already."""

    def architecture(self, config: Config) -> TransformerConfig:
        """The model that learns: the config's, with a language model's head."""
        return read_config(load_hf_config(config.model))

    def open(self, config: Config, architecture: TransformerConfig, which: Part) -> DataSource:
        """Open the samples of training or validation; raises ConfigError and DataError."""

    def glance(self, config: Config, architecture: TransformerConfig, which: Part) -> None:
        """See in a moment whether the data can be read and are of this model, and make nothing of them; raises as `open` does."""
        self.open(config, architecture, which)

    @contextlib.contextmanager
    def measure(self, runner: StepRunner, folder: Path) -> Iterator[dict[str, float]]:
        """Around an evaluation: what it yields holds afterwards what the task measured beside the loss, the same on all ranks."""
        yield {}

    def foresee(self, config: Config, architecture: TransformerConfig) -> DataSource | None:
        """The training samples as they will be, made nowhere that stays; None where that would take long."""
        return self.open(config, architecture, "train")

    def chat(self, config: Config) -> Chat | None:
        """What a saved folder is to say of chats."""


def text_instead(config: Config, which: Part) -> ConfigError | None:
    """What is said where pretraining is given texts that are not tokenised yet."""
    path = getattr(config.data, which)
    if (
        not isinstance(path, str)
        or not is_supported(path)
        or not Path(path).is_file()
        or Path(f"{path}.idx").exists()
    ):
        return None
    prefix = path
    while is_supported(prefix):
        prefix = str(Path(prefix).with_suffix(""))
    command = f"megatrain preprocess {path} --tokenizer {config.data.tokenizer or 'TOKENIZER'} --output {prefix}"
    return ConfigError(
        f"data.{which}",
        path,
        "is a file of texts, and pretraining reads what `megatrain preprocess` makes of them",
        f"make it once, and give data.{which}={prefix}",
        command=command,
    )


class PretrainingTask(Task):
    """Sequences cut from an indexed dataset's stream of tokens."""

    def check(self, config: Config) -> None:
        """Refuse what only finetuning uses."""
        for name in non_default(config.data, OF_CHATS):
            raise ConfigError(
                f"data.{name}",
                getattr(config.data, name),
                "is a setting of `megatrain finetune`",
                "start this config with that verb, or leave it out",
            )
        if config.task != "sft":
            raise ConfigError(
                "task",
                config.task,
                "is a setting of `megatrain finetune`",
                "start this config with that verb, or leave it out",
            )
        if config.train.epochs is not None:
            raise ConfigError(
                "train.epochs",
                config.train.epochs,
                "counts finetuning's samples",
                "give train.steps or train.tokens",
            )
        for text in (text_instead(config, "train"), text_instead(config, "valid")):
            if text is not None:
                raise text

    def prepare(self, config: Config, which: Part) -> None:
        """Nothing: `megatrain preprocess` has made the files."""

    def open(self, config: Config, architecture: TransformerConfig, which: Part) -> DataSource:
        """Samples of `data.train` or `data.valid`."""
        if config.data.train is None:
            raise ConfigError(
                "data.train",
                "(nothing)",
                "is missing",
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

    def glance(self, config: Config, architecture: TransformerConfig, which: Part) -> None:
        """Some samples from all over the files: a token outside the vocabulary shows in each of them, as a rule."""
        samples = self.open(config, architecture, which).samples
        for position in range(GLANCES):
            samples.fetch(position)

    def chat(self, config: Config) -> Chat | None:
        """Nothing."""
        return None
