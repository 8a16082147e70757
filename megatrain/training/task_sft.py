"""The task of finetuning on chats or preference pairs, tokenized once into the run's folder."""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatrain.checkpoint.hf_metadata import Chat
from megatrain.config.loader import Config
from megatrain.data.chat_preprocess import (
    Counts,
    SFTSpec,
    find_prepared,
    is_prepared,
    prepare_data,
    read_counts,
)
from megatrain.data.chat_template import ChatTemplate
from megatrain.data.gpt_dataset import BlendedDataset, parse_blend, select_paths
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preference_dataset import PreferenceDataset
from megatrain.data.preview import preview_samples
from megatrain.data.sft_dataset import SFTDataset
from megatrain.data.shuffle import keyed_integers
from megatrain.data.split import Part, split_documents
from megatrain.data.text_files import find_inputs
from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig
from megatrain.training.task import SANITY_CHECK_SAMPLES, DataSource, Task

logger = logging.getLogger("megatrain")

FEW_BYTES = 4_000_000
"""Size of chat files up to which preparing them takes a few seconds."""


class SFTTask(Task):
    """Chats with a loss on the assistant's tokens, or preference pairs of answers to a prompt."""

    def check(self, config: Config) -> None:
        """Raises ConfigError for missing data or tokenizer, and for settings of pretraining."""
        data = config.data
        if data.train is None:
            raise ConfigError(
                "data.train",
                None,
                "must be set",
                "give a file, folder or glob of JSONL or parquet with chats",
                fix={"data.train": "YOURS.jsonl"},
            )
        if isinstance(data.train, str) and Path(f"{data.train}.idx").exists():
            raise ConfigError(
                "data.train",
                data.train,
                "must be files of chats, not an indexed dataset",
                "give files of chats, or start this config with `megatrain pretrain`",
            )
        if data.document_mask:
            raise ConfigError(
                "data.document_mask",
                True,
                "has no effect on chats",
                "remove it: packed chats attend to themselves only",
                fix={"data.document_mask": False},
            )
        if data.tokenizer is None:
            raise ConfigError(
                "data.tokenizer",
                None,
                "must be set",
                "give the model's tokenizer",
                fix={"data.tokenizer": "FOLDER_OF_THE_MODEL"},
            )

    def prepare(self, config: Config, which: Part) -> None:
        """Tokenizes the files, unless that is done."""
        paths, _ = select_paths(config.data, which)
        for number, (path, _) in enumerate(parse_blend(paths, setting=f"data.{which}")):
            prepare_data(
                path,
                _spec(config),
                folder=_folder(config),
                name=_name(config, which, number),
                progress=sys.stderr,
            )

    def open(self, config: Config, architecture: TransformerConfig, which: Part) -> DataSource:
        """Opens the sequences of `data.train` or `data.valid`."""
        paths, split = select_paths(config.data, which)
        blend = parse_blend(paths, setting=f"data.{which}")
        sources, notes = [], []
        for number, (path, _) in enumerate(blend):
            prefix = find_prepared(
                path, _spec(config), folder=_folder(config), name=_name(config, which, number)
            )
            samples = _open(config, prefix, split, which, number)
            sources.append(samples)
            notes.append(f"{path}: {describe(read_counts(prefix), samples, config)}")
        if len(sources) > 1:
            blended = BlendedDataset(
                sources,
                weights=[weight for _, weight in blend],
                seed=config.run.seed,
                each=1 if config.task == "sft" else 2,
            )
            return DataSource(blended, None, notes)
        epochs = config.train.epochs if which == "train" else 1
        sources[0].limit = epochs * sources[0].samples_per_epoch if epochs is not None else None
        return DataSource(sources[0], sources[0].samples_per_epoch, notes)

    def sanity_check(self, config: Config, architecture: TransformerConfig, which: Part) -> None:
        """Encodes the first samples of each file."""
        paths, _ = select_paths(config.data, which)
        for path, _ in parse_blend(paths, setting=f"data.{which}"):
            for _ in preview_samples(path, _spec(config), count=SANITY_CHECK_SAMPLES, colour=False):
                pass

    def estimate_samples(
        self, config: Config, architecture: TransformerConfig
    ) -> DataSource | None:
        """Returns the training samples if they are prepared, or few enough to prepare them now."""
        paths = [
            path
            for path, _ in parse_blend(select_paths(config.data, "train")[0], setting="data.train")
        ]
        if all(
            is_prepared(
                find_prepared(
                    path,
                    _spec(config),
                    folder=_folder(config),
                    name=_name(config, "train", number),
                )
            )
            for number, path in enumerate(paths)
        ):
            return self.open(config, architecture, "train")
        if (
            sum(file.stat().st_size for path in paths for file in find_inputs([path]).files)
            > FEW_BYTES
        ):
            return None
        with tempfile.TemporaryDirectory() as folder:
            temporary = dataclasses.replace(
                config, run=dataclasses.replace(config.run, output_dir=folder)
            )
            self.prepare(temporary, "train")
            return self.open(temporary, architecture, "train")

    def chat(self, config: Config) -> Chat | None:
        """Returns the chat template, if the config sets one, and the token that ends a turn."""
        assert config.data.tokenizer is not None, "checked in `check`"
        template = ChatTemplate(config.data.tokenizer, file=config.data.chat_template)
        stop = template.stop_token()
        if stop is None:
            logger.warning(
                "the chat template ends answers without a special token; "
                "the model may not learn to stop"
            )
        text = template.tokenizer.chat_template if config.data.chat_template is not None else None
        return Chat(text, [] if stop is None else [stop])


def describe(counts: Counts, samples: SFTDataset, config: Config) -> str:
    """Returns a line about the sequences of a file."""
    is_sft, length = config.task == "sft", config.data.sequence_length
    kind = "chats" if is_sft else "preference pairs"
    number = samples.num_chats if is_sft else samples.num_chats // 2
    sequences = f"{samples.samples_per_epoch:,} sequences, {samples.fill_ratio:.1%} full"
    parts = [f"{number:,} {kind} in {sequences}"]
    if is_sft and not config.data.packing and samples.fill_ratio < 0.7:
        parts[0] += " (data.packing=true packs several chats into one)"
    share = counts.trained / counts.tokens
    parts.append(f"loss on {share:.1%} of {counts.tokens:,} tokens")
    if counts.cut:
        parts.append(f"{counts.cut:,} truncated to data.sequence_length={length}")
    if counts.skipped:
        parts.append(f"{counts.skipped:,} skipped, longer than data.sequence_length={length}")
    if counts.emptied:
        parts.append(
            f"{counts.emptied:,} skipped, without a loss before data.sequence_length={length}"
        )
    return "; ".join(parts)


def preview(config: Config, *, count: int, colour: bool) -> Iterator[str]:
    """Yields the first training samples as text, with the tokens in the loss marked."""
    SFTTask().check(config)
    paths, _ = select_paths(config.data, "train")
    path, _ = parse_blend(paths, setting="data.train")[0]
    return preview_samples(path, _spec(config), count=count, colour=colour)


def _open(config: Config, prefix: Path, split: str | None, which: Part, number: int) -> SFTDataset:
    dataset = IndexedDataset(prefix)
    each, kind = (1, SFTDataset) if config.task == "sft" else (2, PreferenceDataset)
    first, last = 0, dataset.num_documents // each
    if split is not None:
        first, last = split_documents(last, split=split, part=which)
    return kind(
        dataset,
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        padding=0,
        seed=keyed_integers("source", config.run.seed, which, number)[0],
        first=each * first,
        last=each * last,
    )


def _spec(config: Config) -> SFTSpec:
    data = config.data
    assert data.tokenizer is not None, "checked in `check`"
    return SFTSpec(
        data.tokenizer,
        data.chat_template,
        data.train_on,
        data.too_long,
        data.sequence_length,
        pairs=config.task != "sft",
    )


def _folder(config: Config) -> Path:
    return Path(config.run.output_dir) / "data"


def _name(config: Config, which: Part, number: int) -> str:
    """Returns the name of prepared data; with a split, both parts share one file."""
    return f"{'train' if config.data.split is not None else which}{number}"
