"""The task of classification: labels of texts or of words, and its metrics."""

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
from megatrain.data.shuffle import keyed_integers
from megatrain.data.split import Part, split_documents
from megatrain.data.tokenizer import load_tokenizer
from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.mesh import MeshAxis
from megatrain.errors import ConfigError
from megatrain.models.classification_config import PROBLEMS, with_classifier
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.config import ClassificationHeadConfig, TransformerConfig, load_hf_config
from megatrain.telemetry import classification_metrics
from megatrain.telemetry.classification_metrics import Array, Metrics
from megatrain.telemetry.plots import plot_confusion_matrix
from megatrain.training.step_runner import StepRunner
from megatrain.training.task import CHAT_SETTINGS, DataSource, Task

CONFUSION_MATRIX = "confusion_matrix.png"


class ClassificationTask(Task):
    """Classification of texts or of words, or regression on texts."""

    def check(self, config: Config) -> None:
        """Raises ConfigError for missing data or tokenizer, and for settings of other tasks."""
        data, section = config.data, config.classification
        if data.train is None:
            raise ConfigError(
                "data.train",
                None,
                "must be set",
                "give a file, folder or glob of JSONL or parquet with labels",
            )
        for name in ("train", "valid"):
            if not isinstance(getattr(data, name), str | None):
                raise ConfigError(
                    f"data.{name}",
                    getattr(data, name),
                    "must be one file, folder or glob: blends of labelled data are not supported",
                    "merge the files",
                    fix={f"data.{name}": _first_path(getattr(data, name))},
                )
        for name in non_default(data, (*CHAT_SETTINGS, "document_mask")):
            raise ConfigError(
                f"data.{name}",
                getattr(data, name),
                f"has no effect with task={config.task}",
                "remove it",
                fix={f"data.{name}": getattr(type(data)(), name)},
            )
        if data.tokenizer is None:
            raise ConfigError("data.tokenizer", None, "must be set", "give the model's tokenizer")
        if config.task == "token-classification" and section.problem != "single-label":
            raise ConfigError(
                "classification.problem",
                section.problem,
                "requires task=classification (supported by token-classification: single-label)",
                "use single-label, or task=classification",
                fix={"classification.problem": "single-label"},
            )

    def prepare(self, config: Config, which: Part) -> None:
        """Writes nothing: files with labels are small, and are tokenized when they are opened."""

    def architecture(self, config: Config) -> TransformerConfig:
        """Returns the config of the model with a classification head.

        Labels, problem type and padding token are set in the transformers config, too.
        """
        hf = load_hf_config(config.model)
        folder = config.data.tokenizer or ""
        # A missing folder is reported by the checks of the settings.
        tokenizer = load_tokenizer(folder) if Path(folder).is_dir() else None
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
        """Opens the samples of `data.train` or `data.valid`; augments those of training."""
        path, split = select_paths(config.data, which)
        assert isinstance(path, str), "checked in `check`"
        texts = read_labelled_texts(path, label_spec(architecture))
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
        number, labels = samples.samples_per_epoch, _classifier(architecture).num_labels
        note = f"{path}: {number:,} samples, {labels} labels"
        if samples.num_truncated:
            length = config.data.sequence_length
            note += f"; {samples.num_truncated:,} truncated to data.sequence_length={length}"
        return DataSource(samples, number, [note])

    def chat(self, config: Config) -> Chat | None:
        """Returns None: a classifier knows no chats."""
        return None

    @contextlib.contextmanager
    def measure(self, runner: StepRunner, folder: Path) -> Iterator[Metrics]:
        """Adds the task's metrics to the yielded mapping; rank 0 plots the confusion matrix."""
        metrics: Metrics = {}
        with head_outputs(runner.stage, first_copy=runner.mesh.tensor.rank == 0) as outputs:
            yield metrics
        scores, targets = _gather(outputs, runner.mesh.world)
        classifier = _classifier(runner.architecture)
        for name, value in compute_metrics(scores, targets, classifier).items():
            metrics[f"valid_{name}"] = value
        if runner.mesh.rank == 0 and classifier.problem == "single-label":
            matrix = classification_metrics.confusion_matrix(
                targets, scores.argmax(1), classifier.num_labels
            )
            labels = list(runner.architecture.config.id2label.values())
            plot_confusion_matrix(folder / CONFUSION_MATRIX, matrix, labels)


def label_spec(architecture: TransformerConfig) -> LabelSpec:
    """Returns the form of the labels that the model is trained on."""
    classifier = _classifier(architecture)
    labels = [architecture.config.id2label[number] for number in range(classifier.num_labels)]
    return LabelSpec(classifier.of_tokens, classifier.problem, labels)


def padding_token(hf: Any, tokenizer: Any) -> int:
    """Returns the padding token of tokenizer or model, else the end-of-text token, else 0."""
    for token in (
        getattr(tokenizer, "pad_token_id", None),
        hf.pad_token_id,
        getattr(tokenizer, "eos_token_id", None),
    ):
        if isinstance(token, int) and 0 <= token < hf.vocab_size:
            return token
    return 0


def _labels(config: Config, hf: Any) -> list[str]:
    """Returns the labels of the settings, or else of the classifier that `hf` describes.

    Raises:
        ConfigError: there are none; the error lists those of the data.
    """
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
            None,
            "must list the classes in the order of their numbers",
            "those of data.train are in the fix",
            fix={"classification.labels": list(found)},
        )
    return labels


def _first_path(blend: Any) -> str:
    """Returns the first path of a blend."""
    first = blend[0] if isinstance(blend, list) and blend else blend
    return str(first["path"] if isinstance(first, dict) else first)


def _classifier(architecture: TransformerConfig) -> ClassificationHeadConfig:
    assert architecture.classifier is not None
    return architecture.classifier


# -- metrics -------------------------------------------------------------------------------------


@contextlib.contextmanager
def head_outputs(
    stage: torch.nn.Module, *, first_copy: bool
) -> Iterator[list[tuple[Array, Array]]]:
    """Collects scores and targets of each microbatch, filled in after the block.

    Args:
        first_copy: collect them if this rank has the head; False on its copies.
    """
    collected: list[tuple[Array, Array]] = []
    heads = [
        module
        for module in stage.modules()
        if first_copy and isinstance(module, ClassificationHead)
    ]
    for head in heads:
        head.outcomes = []
    try:
        yield collected
        for head in heads:
            collected += [
                (scores.cpu().numpy(), targets.cpu().numpy())
                for scores, targets in head.outcomes or ()
            ]
    finally:
        for head in heads:
            head.outcomes = None


def _gather(outputs: list[tuple[Array, Array]], world: MeshAxis) -> tuple[Array, Array]:
    """Returns the scores [n, classes] and targets of all ranks, on all ranks."""
    parts = [part for rank_parts in gather_objects(outputs, world) for part in rank_parts]
    scores, targets = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(targets)


def compute_metrics(scores: Array, targets: Array, classifier: ClassificationHeadConfig) -> Metrics:
    """Returns the metrics of the head's problem.

    Args:
        scores: the outputs of the head [n, classes].
        targets: classes [n], or values [n, labels].
    """
    if classifier.problem == "single-label":
        return classification_metrics.single_label(targets, scores.argmax(1))
    if classifier.problem == "multi-label":
        return classification_metrics.multi_label(targets > 0.5, scores > 0)
    return classification_metrics.regression(targets[:, 0], scores[:, 0])
