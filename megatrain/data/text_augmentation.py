"""Small data seen a little differently each time: words deleted, swapped or masked at random, as a function of a key.

Easy data augmentation (Wei and Zou, arXiv 1901.11196) without its synonyms, which need a dictionary. What cannot be done
falls back to something that can:

- masking writes the tokenizer's mask token; where it has none, its unknown token; where it has neither, the word is deleted;
- a text of which nothing would be left stays as it is, and so does one of a single word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from megatrain.config.schema import Augment

Word = TypeVar("Word")


def split_words(text: str) -> list[str]:
    """Words with the white space behind them; joined they are the text."""
    return re.findall(r"\s*\S+\s*", text)


def mask_word(tokenizer: object) -> str | None:
    """What a masked word becomes; None where it is deleted."""
    return getattr(tokenizer, "mask_token", None) or getattr(tokenizer, "unk_token", None)


def augment(
    words: Sequence[Word],
    how: Augment,
    *,
    share: float,
    key: Sequence[int],
    masked: Sequence[Word] | None,
) -> list[Word]:
    """The words with about `share` of them deleted, swapped with another or masked; `mix` draws one of the three for a text.

    `masked` holds what each word becomes when it is masked. The same key gives the same words.
    """
    if how == "none" or len(words) < 2:
        return list(words)
    generator = np.random.Generator(np.random.Philox(key=np.array(key[:2], dtype=np.uint64)))
    if how == "mix":
        how = ("delete", "swap", "mask")[int(generator.integers(3))]
    chosen = generator.random(len(words)) < share
    if how == "swap":
        return _swapped(words, chosen, generator)
    if how == "mask" and masked is not None:
        return [
            other if change else word
            for word, other, change in zip(words, masked, chosen, strict=True)
        ]
    kept = [word for word, change in zip(words, chosen, strict=True) if not change]
    return kept or list(words)


def _swapped(
    words: Sequence[Word], chosen: np.ndarray, generator: np.random.Generator
) -> list[Word]:
    result = list(words)
    for index in np.flatnonzero(chosen):
        other = int(generator.integers(len(result)))
        result[index], result[other] = result[other], result[index]
    return result
