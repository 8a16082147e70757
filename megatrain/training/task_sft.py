"""Finetuning's task: chats, prepared once in the run's folder, packed or padded to sequences."""

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
from megatrain.training.task import GLANCES, DataSource, Task

logger = logging.getLogger("megatrain")

FEW_BYTES = 4_000_000
"""Of chats, that take a few seconds to prepare."""


class SFTTask(Task):
    """Chats, with a loss on the assistant's tokens; or pairs of answers to one prompt, compared."""

    def check(self, config: Config) -> None:
        """Refuse what only pretraining uses, and a config without data or tokenizer."""
        data = config.data
        if data.train is None:
            raise ConfigError(
                "data.train",
                "(nothing)",
                "is missing",
                "give a file, folder or glob of JSONL or parquet with chats",
                fix={"data.train": "YOURS.jsonl"},
            )
        if isinstance(data.train, str) and Path(f"{data.train}.idx").exists():
            raise ConfigError(
                "data.train",
                data.train,
                "is an indexed dataset, which `megatrain pretrain` reads",
                "start this config with that verb, or give files of chats",
            )
        if data.document_mask:
            raise ConfigError(
                "data.document_mask",
                True,
                "is a setting of pretraining",
                "leave it out: packed chats attend to themselves alone",
            )
        if data.tokenizer is None:
            raise ConfigError(
                "data.tokenizer",
                "(nothing)",
                "is missing",
                "give the model's tokenizer",
                fix={"data.tokenizer": "FOLDER_OF_THE_MODEL"},
            )

    def prepare(self, config: Config, which: Part) -> None:
        """Tokenise the files, unless that was done."""
        paths, _ = select_paths(config.data, which)
        for number, (path, _) in enumerate(parse_blend(paths, setting=f"data.{which}")):
            prepare_data(
                path,
                _recipe(config),
                folder=_folder(config),
                name=_name(config, which, number),
                progress=sys.stderr,
            )

    def open(self, config: Config, architecture: TransformerConfig, which: Part) -> DataSource:
        """The sequences of `data.train` or `data.valid`."""
        paths, split = select_paths(config.data, which)
        blend = parse_blend(paths, setting=f"data.{which}")
        sources, words = [], []
        for number, (path, _) in enumerate(blend):
            prefix = find_prepared(
                path, _recipe(config), folder=_folder(config), name=_name(config, which, number)
            )
            samples = _open(config, prefix, split, which, number)
            sources.append(samples)
            words.append(f"{path}: {describe(read_counts(prefix), samples, config)}")
        if len(sources) > 1:
            blended = BlendedDataset(
                sources,
                weights=[weight for _, weight in blend],
                seed=config.run.seed,
                each=1 if config.task == "sft" else 2,
            )
            return DataSource(blended, None, words)
        epochs = config.train.epochs if which == "train" else 1
        sources[0].limit = epochs * sources[0].samples_per_epoch if epochs is not None else None
        return DataSource(sources[0], sources[0].samples_per_epoch, words)

    def glance(self, config: Config, architecture: TransformerConfig, which: Part) -> None:
        """The first samples of each file, as they would be learnt."""
        paths, _ = select_paths(config.data, which)
        for path, _ in parse_blend(paths, setting=f"data.{which}"):
            for _ in preview_samples(path, _recipe(config), count=GLANCES, colour=False):
                pass

    def foresee(self, config: Config, architecture: TransformerConfig) -> DataSource | None:
        """From data that are prepared, or so few that they can be prepared for this question alone."""
        paths = [
            path
            for path, _ in parse_blend(select_paths(config.data, "train")[0], setting="data.train")
        ]
        if all(
            is_prepared(
                find_prepared(
                    path,
                    _recipe(config),
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
            elsewhere = dataclasses.replace(
                config, run=dataclasses.replace(config.run, output_dir=folder)
            )
            self.prepare(elsewhere, "train")
            return self.open(elsewhere, architecture, "train")

    def chat(self, config: Config) -> Chat | None:
        """The template where the config names one, and the token that ends a turn."""
        assert config.data.tokenizer is not None, "checked in `check`"
        template = ChatTemplate(config.data.tokenizer, file=config.data.chat_template)
        stop = template.stop_token()
        if stop is None:
            logger.warning(
                "the chat template ends an answer with no special token that could be told: the model may not learn where to stop"
            )
        text = template.tokenizer.chat_template if config.data.chat_template is not None else None
        return Chat(text, [] if stop is None else [stop])


def describe(counts: Counts, samples: SFTDataset, config: Config) -> str:
    """What became of a file's chats, or pairs of answers, in a sentence."""
    alone = config.task == "sft"
    what = (
        f"{samples.num_chats:,} chats" if alone else f"{samples.num_chats // 2:,} pairs of answers"
    )
    words = f"{what} in {samples.samples_per_epoch:,} sequences, {samples.fill_ratio:.1%} full"
    if alone and not config.data.packing and samples.fill_ratio < 0.7:
        words += " (data.packing=true lets chats share them)"
    words += f"; {counts.trained / counts.tokens:.1%} of {counts.tokens:,} tokens are {'learnt' if alone else 'compared'}"
    if counts.cut:
        words += f"; {counts.cut:,} cut at data.sequence_length={config.data.sequence_length}"
    if left_out := counts.skipped + counts.emptied:
        reason = (
            "longer than that"
            if counts.cut
            else f"longer than data.sequence_length={config.data.sequence_length}"
        )
        words += f"; {left_out:,} left out, {reason}" + (
            " before anything to learn" if counts.emptied else ""
        )
    return words


def show(config: Config, *, count: int, colour: bool) -> Iterator[str]:
    """The first training samples, with what is learnt marked."""
    SFTTask().check(config)
    paths, _ = select_paths(config.data, "train")
    path, _ = parse_blend(paths, setting="data.train")[0]
    return preview_samples(path, _recipe(config), count=count, colour=colour)


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


def _recipe(config: Config) -> SFTSpec:
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
    """Of the prepared data; with a split both parts are cut from one."""
    return f"{'train' if config.data.split is not None else which}{number}"
