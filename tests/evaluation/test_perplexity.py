"""Windows predict every token once, with as much context as window and stride allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.evaluation.loglikelihood import IGNORED, Row
from megatrain.evaluation.perplexity import make_rows, make_windows


def draw(text, **settings):
    return [
        ("".join(row.tokens), "".join("." if label == IGNORED else label for label in row.labels))
        for row in make_rows(text, **settings)
    ]


def test_example_of_the_docstring():
    assert draw("pabcdefgh", window=4, stride=2) == [
        ("pabc", "abcd"),
        ("bcde", "..ef"),
        ("defg", "..gh"),
    ]


def test_stride_of_the_window_equals_the_harness():
    """The example of lm-evaluation-harness: tokens 0..9 after a prefix, 4 at a time."""
    assert draw("p0123456789", window=4, stride=4) == [
        ("p012", "0123"),
        ("3456", "4567"),
        ("5678", "..89"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"), [("pab", [("pa", "ab")]), ("pa", [("p", "a")]), ("p", []), ("", [])]
)
def test_texts_shorter_than_the_window(text, expected):
    assert draw(text, window=4, stride=2) == expected


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_predict_every_token_once(predictions, window, data):
    stride = data.draw(st.integers(1, window))
    found = list(make_windows(predictions, window=window, stride=stride))
    scored = [
        index for place in found for index in range(place.stop - place.scored + 1, place.stop + 1)
    ]
    assert scored == list(range(1, predictions + 1))
    for place in found:
        assert 1 <= place.stop - place.start <= window
        # the window is used in full
        assert place.start == max(0, place.stop - window)


def test_rows_have_as_many_labels_as_tokens():
    for row in make_rows(list(range(50)), window=7, stride=3):
        assert isinstance(row, Row)
        assert len(row.tokens) == len(row.labels)
