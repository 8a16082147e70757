"""Every token is predicted once, with as much before it as the window and stride allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.evaluation.windows import IGNORED, Row, rows, windows


def drawn(text, **settings):
    return [
        ("".join(row.tokens), "".join("." if label == IGNORED else label for label in row.labels))
        for row in rows(text, **settings)
    ]


def test_the_drawing_of_the_docstring():
    assert drawn("pabcdefgh", window=4, stride=2) == [
        ("pabc", "abcd"),
        ("bcde", "..ef"),
        ("defg", "..gh"),
    ]


def test_a_stride_of_the_window_is_the_harness_way():
    """lm-evaluation-harness's own example: tokens 0..9 after a prefix, 4 at a time, the last window reaching back."""
    assert drawn("p0123456789", window=4, stride=4) == [
        ("p012", "0123"),
        ("3456", "4567"),
        ("5678", "..89"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"), [("pab", [("pa", "ab")]), ("pa", [("p", "a")]), ("p", []), ("", [])]
)
def test_texts_shorter_than_the_window(text, expected):
    assert drawn(text, window=4, stride=2) == expected


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_each_prediction_once_and_no_window_too_long(predictions, window, data):
    stride = data.draw(st.integers(1, window))
    found = list(windows(predictions, window=window, stride=stride))
    scored = [
        index for place in found for index in range(place.stop - place.scored + 1, place.stop + 1)
    ]
    assert scored == list(range(1, predictions + 1))
    for place in found:
        assert 1 <= place.stop - place.start <= window
        # all that the window could see is seen
        assert place.start == max(0, place.stop - window)


def test_a_row_has_as_many_labels_as_tokens():
    for row in rows(list(range(50)), window=7, stride=3):
        assert isinstance(row, Row)
        assert len(row.tokens) == len(row.labels)
