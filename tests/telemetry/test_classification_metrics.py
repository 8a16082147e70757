"""Metrics against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.telemetry.classification_metrics import (
    class_metrics,
    confusion_matrix,
    multi_label,
    regression,
    single_label,
)

TARGETS, PREDICTIONS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]), np.array([0, 0, 1, 1, 2, 2, 2, 0, 2])


def test_single_label_metrics():
    matrix = confusion_matrix(TARGETS, PREDICTIONS, 3)
    assert matrix.tolist() == [[2, 1, 0], [0, 1, 1], [1, 0, 3]]
    metrics = single_label(TARGETS, PREDICTIONS)
    assert metrics["accuracy"] == metrics["f1_micro"] == pytest.approx(6 / 9)
    assert metrics["precision_macro"] == pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3)
    assert metrics["recall_macro"] == pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3)
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3)
    assert class_metrics(TARGETS, PREDICTIONS, ["a", "b", "c"])["c"] == {
        "precision": 0.75,
        "recall": 0.75,
        "f1": 0.75,
        "support": 4,
    }


def test_absent_classes_are_left_out_of_macro_means():
    """A class that occurs only in the targets, or only in the predictions, counts as 0."""
    metrics = single_label(np.array([0, 0, 1]), np.array([0, 2, 0]))
    assert metrics["precision_macro"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert metrics["recall_macro"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert metrics["f1_macro"] == pytest.approx(1 / 6)


def test_multi_label_metrics():
    targets = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)
    predictions = np.array([[1, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 0]], dtype=bool)
    metrics = multi_label(targets, predictions)
    assert metrics["accuracy"] == 0.25
    assert (metrics["precision_micro"], metrics["recall_micro"]) == (4 / 6, 4 / 5)
    assert metrics["f1_micro"] == pytest.approx(8 / 11)
    assert metrics["precision_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert metrics["recall_macro"] == pytest.approx(2 / 3)
    assert metrics["f1_macro"] == pytest.approx((0.8 + 1 + 0) / 3)


def test_regression_metrics():
    metrics = regression(np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0, 3.0]))
    assert metrics == {
        "mse": pytest.approx(1.25 / 3),
        "mae": pytest.approx(0.5),
        "r2": pytest.approx(1 - 1.25 / (14 / 3)),
    }
    assert regression(np.array([2.0, 2.0]), np.array([2.0, 2.0]))["r2"] == 0.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_macro_f1_is_one_only_for_perfect_predictions(pairs):
    targets, predictions = (np.array(column) for column in zip(*pairs, strict=True))
    metrics = single_label(targets, predictions)
    assert all(0 <= value <= 1 for value in metrics.values())
    assert (metrics["f1_macro"] == 1) == bool((targets == predictions).all())
    assert confusion_matrix(targets, predictions, 4).sum() == len(pairs)
