"""Classification heads in transformers configs: their name in a checkpoint, classes and problem
type."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatrain.errors import ConfigError
from megatrain.models.config import ClassificationHeadConfig, TransformerConfig, read_config

_TOKEN_CLASSIFIERS = {"gpt2": "classifier", "gpt_neox": "classifier"}
"""Transformers' name of a token classifier's matrix, in families where it is not `score`."""

PROBLEMS = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""Transformers' `problem_type` for each `classification.problem`."""


def any_architecture(hf: Any) -> TransformerConfig:
    """Returns the transformer config of a language model or of a classifier."""
    for name in hf.architectures or ():
        if name.endswith(("ForSequenceClassification", "ForTokenClassification")):
            return with_classifier(hf, of_tokens=name.endswith("ForTokenClassification"))
    return read_config(hf)


def with_classifier(
    hf: Any, *, of_tokens: bool, dropout: float = 0.0, label_smoothing: float = 0.0
) -> TransformerConfig:
    """Returns the classifier of a transformers config whose labels, problem and padding are set."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    if type(hf) not in auto._model_mapping:
        raise ConfigError(
            "task",
            "token-classification" if of_tokens else "classification",
            f"is not supported by transformers for {hf.model_type} models",
            "choose a model of another family",
        )
    problems = {name: problem for problem, name in PROBLEMS.items()}
    default = "regression" if hf.num_labels == 1 else "single-label"
    problem: Any = "single-label" if of_tokens else problems.get(hf.problem_type, default)
    classifier = ClassificationHeadConfig(
        num_labels=hf.num_labels,
        of_tokens=of_tokens,
        problem=problem,
        name=_TOKEN_CLASSIFIERS.get(hf.model_type, "score") if of_tokens else "score",
        bias=of_tokens,
        dropout=dropout,
        label_smoothing=label_smoothing,
    )
    return replace(read_config(hf), tied=False, classifier=classifier)
