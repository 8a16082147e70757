"""What a transformers config says of a classifier: its head's name in a checkpoint, its classes and what kind of problem they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatrain.errors import ConfigError
from megatrain.models.config import ClassificationHeadConfig, TransformerConfig, read_config

_HEADS_OF_TOKENS = {"gpt2": "classifier", "gpt_neox": "classifier"}
"""What transformers calls the matrix of a token classifier where it is not `score`."""

PROBLEMS = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""Each `classification.problem` in transformers' words."""


def any_architecture(hf: Any) -> TransformerConfig:
    """Of a language model, or of a classifier where the config says that it is one."""
    for name in hf.architectures or ():
        if name.endswith(("ForSequenceClassification", "ForTokenClassification")):
            return with_classifier(hf, of_tokens=name.endswith("ForTokenClassification"))
    return read_config(hf)


def with_classifier(
    hf: Any, *, of_tokens: bool, dropout: float = 0.0, label_smoothing: float = 0.0
) -> TransformerConfig:
    """The architecture of a transformers config whose labels, problem and padding are set."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    offered = (
        AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    )._model_mapping
    if type(hf) not in offered:
        task = "token-classification" if of_tokens else "classification"
        raise ConfigError(
            "task",
            task,
            f"is not offered by transformers for {hf.model_type} models",
            "choose another family",
        )
    problems = {name: problem for problem, name in PROBLEMS.items()}
    problem: Any = problems.get(
        hf.problem_type, "regression" if hf.num_labels == 1 and not of_tokens else "single-label"
    )
    name = _HEADS_OF_TOKENS.get(hf.model_type, "score") if of_tokens else "score"
    classifier = ClassificationHeadConfig(
        num_labels=hf.num_labels,
        of_tokens=of_tokens,
        problem="single-label" if of_tokens else problem,
        name=name,
        bias=of_tokens,
        dropout=dropout,
        label_smoothing=label_smoothing,
    )
    return replace(read_config(hf), tied=False, classifier=classifier)
