"""Classification and regression metrics of scikit-learn, by the names of metrics.jsonl.

Precision of a class that is never predicted, and recall of one that never occurs, are 0. Macro
means are over the classes that occur in the targets or the predictions; of multi-label problems,
over all.
scikit-learn is imported by the functions: pretraining does not need it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Metrics = dict[str, float]


def confusion_matrix(targets: Array, predictions: Array, num_labels: int) -> Array:
    """Returns counts, int64 [target class, predicted class], from classes [n]."""
    from sklearn.metrics import confusion_matrix

    if not len(targets):
        return np.zeros((num_labels, num_labels), dtype=np.int64)
    return confusion_matrix(targets, predictions, labels=range(num_labels))


def class_metrics(targets: Array, predictions: Array, labels: list[str]) -> dict[str, Metrics]:
    """Returns precision, recall, F1 and support of each class, by its label, from classes [n]."""
    columns = _scores(targets, predictions, average=None, labels=range(len(labels)))
    names = ("precision", "recall", "f1", "support")
    return {
        label: dict(zip(names, map(float, values), strict=True))
        for label, *values in zip(labels, *columns, strict=True)
    }


def single_label(targets: Array, predictions: Array) -> Metrics:
    """Returns the metrics of one class per sample, both int [n].

    Micro-averaged precision, recall and F1 all equal the accuracy.
    """
    accuracy = float((targets == predictions).mean())
    micro = dict.fromkeys(("precision_micro", "recall_micro", "f1_micro"), accuracy)
    return {"accuracy": accuracy, **_averaged(targets, predictions, "macro"), **micro}


def multi_label(targets: Array, predictions: Array) -> Metrics:
    """Returns the metrics of any number of classes per sample, both bool [n, classes].

    The accuracy counts samples with all classes correct.
    """
    return {
        "accuracy": float((targets == predictions).all(1).mean()),
        **_averaged(targets, predictions, "macro"),
        **_averaged(targets, predictions, "micro"),
    }


def regression(targets: Array, predictions: Array) -> Metrics:
    """Returns mean squared and absolute error and R2 of values [n]; R2 of constant targets is 0."""
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    targets, predictions = targets.astype(np.float64), predictions.astype(np.float64)
    is_constant = bool((targets == targets[0]).all())
    return {
        "mse": float(mean_squared_error(targets, predictions)),
        "mae": float(mean_absolute_error(targets, predictions)),
        "r2": 0.0 if is_constant else float(r2_score(targets, predictions)),
    }


def _averaged(targets: Array, predictions: Array, average: str) -> Metrics:
    precision, recall, f1, _ = _scores(targets, predictions, average=average)
    return {
        f"precision_{average}": float(precision),
        f"recall_{average}": float(recall),
        f"f1_{average}": float(f1),
    }


def _scores(targets: Array, predictions: Array, **options: Any) -> tuple[Any, Any, Any, Any]:
    from sklearn.metrics import precision_recall_fscore_support

    return precision_recall_fscore_support(targets, predictions, zero_division=0, **options)
