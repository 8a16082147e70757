"""Classification's task: texts or words with labels, the model that tells them, and how well it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatrain.checkpoint.hf_metadata import Chat
from megatrain.config.loader import Config
from megatrain.config.schema import non_default
from megatrain.data.classification_dataset import (
    ClassificationDataset,
    LabelSpec,
    find_labels,
    read_labelled_texts,
)
from megatrain.data.gpt_dataset import select_paths
from megatrain.data.label_targets import MAX_CLASSES, decode_targets
from megatrain.data.shuffle import keyed_integers
from megatrain.data.split import Part, split_documents
from megatrain.data.tokenizer import load_tokenizer
from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.mesh import MeshAxis
from megatrain.errors import ConfigError
from megatrain.evaluation import classification_metrics
from megatrain.evaluation.classification_metrics import Figures, Matrix
from megatrain.models.classification_config import PROBLEMS, with_classifier
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.config import ClassificationHeadConfig, TransformerConfig, load_hf_config
from megatrain.telemetry.plots import plot_confusion_matrix
from megatrain.training.step_runner import StepRunner
from megatrain.training.task import OF_CHATS, DataSource, Task


class ClassificationTask(Task):
    """Labels of texts or of words."""

    def check(self, config: Config) -> None:
        """Refuse what other tasks use, and a config without data, tokenizer or labels."""
        data, section = config.data, config.classification
        if data.train is None:
            raise ConfigError(
                "data.train",
                "(nothing)",
                "is missing",
                "give a file, folder or glob of JSONL or parquet with labels",
            )
        for name in ("train", "valid"):
            if not isinstance(getattr(data, name), str | None):
                raise ConfigError(
                    f"data.{name}",
                    getattr(data, name),
                    "is a blend, and labels are not blended",
                    "give one file, folder or glob",
                )
        for name in non_default(data, (*OF_CHATS, "document_mask")):
            raise ConfigError(
                f"data.{name}",
                getattr(data, name),
                f"has no effect with task={config.task}",
                "leave it out",
            )
        if data.tokenizer is None:
            raise ConfigError(
                "data.tokenizer", "(nothing)", "is missing", "give the model's tokenizer"
            )
        if config.task == "token-classification" and section.problem != "single-label":
            raise ConfigError(
                "classification.problem",
                section.problem,
                "is of texts, and task=token-classification tells one class a word",
                "use single-label, or task=classification",
            )

    def prepare(self, config: Config, which: Part) -> None:
        """Nothing: files with labels are small, and read as they are."""

    def architecture(self, config: Config) -> TransformerConfig:
        """The model with a classifier for its head, as a transformers config can tell it."""
        hf = load_hf_config(config.model)
        folder = config.data.tokenizer or ""
        tokenizer = (
            load_tokenizer(folder) if Path(folder).is_dir() else None
        )  # said where settings are checked
        labels = _labels(config, hf)
        hf.id2label = dict(enumerate(labels))
        hf.label2id = {label: number for number, label in enumerate(labels)}
        hf.problem_type = (
            PROBLEMS[config.classification.problem] if config.task == "classification" else None
        )
        hf.pad_token_id = padding_token(hf, tokenizer)
        if config.task == "token-classification":
            hf.classifier_dropout = config.classification.dropout
        section = config.classification
        return with_classifier(
            hf,
            of_tokens=config.task == "token-classification",
            dropout=section.dropout,
            label_smoothing=section.label_smoothing,
        )

    def open(self, config: Config, architecture: TransformerConfig, which: Part) -> DataSource:
        """Samples of `data.train` or `data.valid`, augmented in training if asked."""
        path, split = select_paths(config.data, which)
        assert isinstance(path, str), "checked in `check`"
        texts = read_labelled_texts(path, reading(architecture))
        if split is not None:
            first, last = split_documents(len(texts), split=split, part=which)
            texts = texts[first:last]
        section, train = config.classification, which == "train"
        samples = ClassificationDataset(
            texts,
            load_tokenizer(config.data.tokenizer or ""),
            of_tokens=_classifier(architecture).of_tokens,
            sequence_length=config.data.sequence_length,
            padding=architecture.padding_token or 0,
            seed=keyed_integers("source", config.run.seed, which)[0],
            augmentation=section.augment if train else "none",
            augment_share=section.augment_share,
        )
        epochs = config.train.epochs if train else 1
        samples.limit = epochs * samples.samples_per_epoch if epochs is not None else None
        cut = (
            f"; {samples.num_truncated:,} cut at data.sequence_length={config.data.sequence_length}"
            if samples.num_truncated
            else ""
        )
        return DataSource(
            samples,
            samples.samples_per_epoch,
            [
                f"{path}: {samples.samples_per_epoch:,} samples, {_classifier(architecture).num_labels} labels{cut}"
            ],
        )

    def chat(self, config: Config) -> Chat | None:
        """Nothing."""
        return None

    @contextlib.contextmanager
    def measure(self, runner: StepRunner, folder: Path) -> Iterator[Figures]:
        """Watch an evaluation and fill in its figures; rank 0 draws the confusion of classes into the run's folder."""
        figures: Figures = {}
        with watched(runner.stage, first_copy=runner.mesh.tensor.rank == 0) as outcomes:
            yield figures
        scores, numbers = _gathered(outcomes, runner.mesh.world)
        classifier = _classifier(runner.architecture)
        figures.update(
            {
                f"valid_{name}": value
                for name, value in figures_of(scores, numbers, classifier).items()
            }
        )
        if runner.mesh.rank == 0 and classifier.problem == "single-label":
            matrix = classification_metrics.confusion_matrix(
                numbers, scores.argmax(1), classifier.num_labels
            )
            plot_confusion_matrix(
                folder / "confusion.png",
                matrix,
                list(runner.architecture.config.id2label.values()),
            )


def reading(architecture: TransformerConfig) -> LabelSpec:
    """What the model's records look like."""
    classifier = _classifier(architecture)
    labels = [architecture.config.id2label[number] for number in range(classifier.num_labels)]
    return LabelSpec(classifier.of_tokens, classifier.problem, labels)


def padding_token(hf: Any, tokenizer: Any) -> int:
    """The tokenizer's padding, the model's, or as is usual the end of a text."""
    for token in (
        getattr(tokenizer, "pad_token_id", None),
        hf.pad_token_id,
        getattr(tokenizer, "eos_token_id", None),
    ):
        if isinstance(token, int) and 0 <= token < hf.vocab_size:
            return token
    return 0


def _labels(config: Config, hf: Any) -> list[str]:
    """As the settings name them, or as a classifier's folder brings them; else the error lists what the data hold."""
    section = config.classification
    if section.problem == "regression":
        return section.labels or ["value"]
    labels = section.labels
    if labels is None and any("Classification" in name for name in hf.architectures or ()):
        labels = [hf.id2label[number] for number in range(hf.num_labels)]
    if labels is None:
        found = find_labels(
            str(config.data.train),
            of_tokens=config.task == "token-classification",
            problem=section.problem,
        )
        raise ConfigError(
            "classification.labels",
            "(nothing)",
            "is missing: it names the classes in the order of their numbers",
            f"of data.train it would be classification.labels=[{', '.join(found)}]",
        )
    if section.problem == "multi-label" and len(labels) > MAX_CLASSES:
        raise ConfigError(
            "classification.labels",
            f"({len(labels)} labels)",
            f"is more than the {MAX_CLASSES} of a multi-label problem",
        )
    return labels


def _classifier(architecture: TransformerConfig) -> ClassificationHeadConfig:
    assert architecture.classifier is not None
    return architecture.classifier


# ---------------------------------------------------------------------------------------------------------------------
# how well it does


@contextlib.contextmanager
def watched(stage: torch.nn.Module, *, first_copy: bool) -> Iterator[list[tuple[Matrix, Matrix]]]:
    """Collects scores and targets' numbers of each microbatch that the head sees, where it is on this rank and speaks for its copies."""
    found: list[tuple[Matrix, Matrix]] = []
    heads = (
        [module for module in stage.modules() if isinstance(module, ClassificationHead)]
        if first_copy
        else []
    )
    for head in heads:
        head.outcomes = []
    try:
        yield found
        for head in heads:
            found += [
                (scores.cpu().numpy(), numbers.cpu().numpy())
                for scores, numbers in head.outcomes or ()
            ]
    finally:
        for head in heads:
            head.outcomes = None


def _gathered(outcomes: list[tuple[Matrix, Matrix]], world: MeshAxis) -> tuple[Matrix, Matrix]:
    """Of all ranks, on all ranks: scores [n, classes] and numbers [n]."""
    parts = [part for some in gather_objects(outcomes, world) for part in some]
    return np.concatenate([scores for scores, _ in parts]), np.concatenate(
        [numbers for _, numbers in parts]
    )


def figures_of(scores: Matrix, numbers: Matrix, classifier: ClassificationHeadConfig) -> Figures:
    """What a problem is measured by."""
    right = decode_targets(
        torch.from_numpy(numbers), problem=classifier.problem, num_labels=classifier.num_labels
    ).numpy()
    if classifier.problem == "single-label":
        return classification_metrics.single_label(right, scores.argmax(1), classifier.num_labels)
    if classifier.problem == "multi-label":
        return classification_metrics.multi_label(right > 0.5, scores > 0)
    return classification_metrics.regression(right[:, 0], scores[:, 0])
