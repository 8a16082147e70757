"""Metrics of a classifier on labelled texts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from megatrain.data.classification_dataset import encode_text, read_labelled_texts
from megatrain.evaluation.loglikelihood import Row, Scorer
from megatrain.evaluation.spec import EvalSpec
from megatrain.models.config import TransformerConfig
from megatrain.telemetry import classification_metrics
from megatrain.training.task_classification import compute_metrics, label_spec


class ClassificationResult(NamedTuple):
    """Metrics; for one class a text or token also those of each class, and the confusion matrix."""

    metrics: dict[str, Any]
    classes: dict[str, dict[str, float]]
    confusion: classification_metrics.Array | None


def measure_classification(
    spec: EvalSpec, scorer: Scorer, tokenizer: Any, architecture: TransformerConfig
) -> ClassificationResult:
    """Returns the metrics over all texts of `spec.data`; all ranks call it together."""
    classifier, record_format = scorer.classifier, label_spec(architecture)
    assert classifier is not None
    texts = [text for path in spec.data for text in read_labelled_texts(path, record_format)]
    samples = [
        encode_text(
            text,
            tokenizer,
            of_tokens=classifier.of_tokens,
            length=spec.window,
            padding=architecture.padding_token or 0,
        )
        for text in texts
    ]
    outputs = list(scorer.outputs(Row(sample.tokens, sample.labels) for sample in samples))
    if classifier.problem == "single-label":
        targets = np.array([label for sample in samples for label in sample.labels if label >= 0])
    else:
        targets = np.stack([sample.targets for sample in samples if sample.targets is not None])
    metrics: dict[str, Any] = {}
    if classifier.of_tokens:
        predicted = np.array(
            [
                int(classes[position])
                for classes, sample in zip(outputs, samples, strict=True)
                for position, label in enumerate(sample.labels)
                if label >= 0
            ]
        )
        metrics |= classification_metrics.single_label(targets, predicted)
    else:
        scores = np.array(outputs)
        predicted = scores.argmax(1)
        metrics |= compute_metrics(scores, targets, classifier)
    metrics |= {
        "samples": len(texts),
        "labelled": len(targets),
        "cut": sum(sample.is_truncated for sample in samples),
    }
    if classifier.problem != "single-label":
        return ClassificationResult(metrics, {}, None)
    matrix = classification_metrics.confusion_matrix(targets, predicted, classifier.num_labels)
    classes = classification_metrics.class_metrics(targets, predicted, record_format.labels)
    return ClassificationResult(metrics, classes, matrix)
