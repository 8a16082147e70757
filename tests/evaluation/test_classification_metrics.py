"""Figures by hand; the decimals are scikit-learn's on the same labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.evaluation.classification_metrics import (
    confusion_matrix,
    multi_label,
    named_classes,
    regression,
    single_label,
)

RIGHT, SAID = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]), np.array([0, 0, 1, 1, 2, 2, 2, 0, 2])


def test_one_class_a_sample():
    matrix = confusion_matrix(RIGHT, SAID, 3)
    assert matrix.tolist() == [[2, 1, 0], [0, 1, 1], [1, 0, 3]]
    figures = single_label(RIGHT, SAID, 3)
    assert figures["accuracy"] == figures["f1_micro"] == pytest.approx(6 / 9)
    assert figures["precision_macro"] == pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3)
    assert figures["recall_macro"] == pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3)
    assert figures["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3)
    assert named_classes(matrix, ["a", "b", "c"])["c"] == {
        "precision": 0.75,
        "recall": 0.75,
        "f1": 0.75,
        "support": 4,
    }


def test_classes_that_never_occur():
    """Never said nor right: left out of the means. Said and never right, or the other way: 0."""
    figures = single_label(np.array([0, 0, 1]), np.array([0, 2, 0]), 5)
    assert figures["precision_macro"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert figures["recall_macro"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert figures["f1_macro"] == pytest.approx(1 / 6)


def test_any_number_of_classes_a_sample():
    right = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)
    said = np.array([[1, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 0]], dtype=bool)
    figures = multi_label(right, said)
    assert figures["accuracy"] == 0.25
    assert (figures["precision_micro"], figures["recall_micro"]) == (4 / 6, 4 / 5)
    assert figures["f1_micro"] == pytest.approx(8 / 11)
    assert figures["precision_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert figures["recall_macro"] == pytest.approx(2 / 3)
    assert figures["f1_macro"] == pytest.approx((0.8 + 1 + 0) / 3)


def test_numbers():
    figures = regression(np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0, 3.0]))
    assert figures == {
        "mse": pytest.approx(1.25 / 3),
        "mae": pytest.approx(0.5),
        "r2": pytest.approx(1 - 1.25 / (14 / 3)),
    }
    assert regression(np.array([2.0, 2.0]), np.array([2.0, 2.0]))["r2"] == 0.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_macro_f1_lies_between_zero_and_one_and_is_one_only_when_all_is_right(pairs):
    right, said = (np.array(column) for column in zip(*pairs, strict=True))
    figures = single_label(right, said, 4)
    assert all(0 <= value <= 1 for value in figures.values())
    assert (figures["f1_macro"] == 1) == bool((right == said).all())
    assert confusion_matrix(right, said, 4).sum() == len(pairs)
