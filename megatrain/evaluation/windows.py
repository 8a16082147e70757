"""Which tokens a model sees when it is asked for which: windows over a text longer than the model's positions.

A row is what comes before the text (a prefix token), then the text. Window 4, stride 2, a row of 9 tokens:

    row         p a b c d e f g h
    window 0    p a b c              predicts a b c d
    window 1        b c d e          predicts       e f     and sees two tokens more than it would alone
    window 2            d e f g      predicts           g h

Every token after the first is predicted once. A stride of the whole window is what lm-evaluation-harness does; a smaller
one costs more and sees more, as in transformers' guide to perplexity. The last window reaches back as far as it can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

IGNORED = -100


class Window(NamedTuple):
    """Inputs are row[start:stop], labels row[start + 1 : stop + 1], of which the last `scored` count."""

    start: int
    stop: int
    scored: int


class Row(NamedTuple):
    """What is put to the model at once, and which predictions count: equally many tokens and labels."""

    tokens: list[int]
    labels: list[int]


def windows(predictions: int, *, window: int, stride: int) -> Iterator[Window]:
    """Windows of at most `window` tokens over a row of `predictions` + 1."""
    assert 1 <= stride <= window, (stride, window)
    done = 0
    while done < predictions:
        stop = min(done + (stride if done else window), predictions)
        yield Window(max(0, stop - window), stop, stop - done)
        done = stop


def rows(tokens: Sequence[int], *, window: int, stride: int) -> Iterator[Row]:
    """The rows that predict every token after the first."""
    for place in windows(len(tokens) - 1, window=window, stride=stride):
        yield row(tokens[place.start : place.stop + 1], scored=place.scored)


def row(tokens: Sequence[int], *, scored: int) -> Row:
    """A row that predicts the last `scored` of the tokens from those before them."""
    unscored = len(tokens) - 1 - scored
    assert unscored >= 0, (len(tokens), scored)
    return Row(list(tokens[:-1]), [IGNORED] * unscored + list(tokens[1 + unscored :]))
