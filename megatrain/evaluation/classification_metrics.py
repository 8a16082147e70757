"""How well labels were told: accuracy, precision, recall and F1, each by class, macro and micro, from counts.

The words and conventions are scikit-learn's: a class that was never said has precision 0, one that never was right has recall 0.
Macro figures are means over the classes that occur, in the data or in what was said.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Matrix = np.ndarray[Any, np.dtype[Any]]
Figures = dict[str, float]


class ClassFigures(NamedTuple):
    """Of each class: precision, recall, F1 and how often it is right, each [classes]."""

    precision: Matrix
    recall: Matrix
    f1: Matrix
    support: Matrix


def confusion_matrix(right: Matrix, said: Matrix, num_labels: int) -> Matrix:
    """int64 [right class, said class] of classes [n]."""
    return np.bincount(right * num_labels + said, minlength=num_labels**2).reshape(
        num_labels, num_labels
    )


def by_class(hits: Matrix, said: Matrix, right: Matrix) -> ClassFigures:
    """From how often each class was said rightly, said, and right."""
    precision, recall = _ratio(hits, said), _ratio(hits, right)
    return ClassFigures(
        precision, recall, _ratio(2 * precision * recall, precision + recall), right
    )


def named_classes(matrix: Matrix, labels: list[str]) -> dict[str, Figures]:
    """Precision, recall, F1 and support of each class, from int [right class, said class]."""
    classes = by_class(np.diag(matrix), matrix.sum(0), matrix.sum(1))
    return {
        label: {name: float(values[number]) for name, values in classes._asdict().items()}
        for number, label in enumerate(labels)
    }


def single_label(right: Matrix, said: Matrix, num_labels: int) -> Figures:
    """Figures of one class a sample; micro-averaged precision, recall and F1 are all the accuracy."""
    matrix = confusion_matrix(right, said, num_labels)
    accuracy = float(np.trace(matrix) / max(1, matrix.sum()))
    classes = by_class(np.diag(matrix), matrix.sum(0), matrix.sum(1))
    micro = dict.fromkeys(("precision_micro", "recall_micro", "f1_micro"), accuracy)
    return {
        "accuracy": accuracy,
        **_macro(classes, occurs=matrix.sum(0) + matrix.sum(1) > 0),
        **micro,
    }


def multi_label(right: Matrix, said: Matrix) -> Figures:
    """Figures of any number of classes a sample, both bool [n, classes]; accuracy is of whole samples."""
    hits, times_said, times_right = (right & said).sum(0), said.sum(0), right.sum(0)
    classes = by_class(hits, times_said, times_right)
    micro = by_class(*(np.array([counts.sum()]) for counts in (hits, times_said, times_right)))
    return {
        "accuracy": float((right == said).all(1).mean()) if len(right) else 0.0,
        **_macro(classes, occurs=np.ones(right.shape[1], dtype=bool)),
        "precision_micro": float(micro.precision[0]),
        "recall_micro": float(micro.recall[0]),
        "f1_micro": float(micro.f1[0]),
    }


def regression(right: Matrix, said: Matrix) -> Figures:
    """Mean squared and absolute error, and R2: 1 is perfect, 0 as good as the mean; both fp [n]."""
    error = said.astype(np.float64) - right
    spread = float(((right - right.mean()) ** 2).sum())
    return {
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "r2": 1 - float((error**2).sum()) / spread if spread else 0.0,
    }


def _macro(classes: ClassFigures, *, occurs: Matrix) -> Figures:
    def mean(values: Matrix) -> float:
        return float(values[occurs].mean()) if occurs.any() else 0.0

    return {
        "precision_macro": mean(classes.precision),
        "recall_macro": mean(classes.recall),
        "f1_macro": mean(classes.f1),
    }


def _ratio(part: Matrix, whole: Matrix) -> Matrix:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
