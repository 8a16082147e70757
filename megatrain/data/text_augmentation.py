"""Random deletion, swaps and masking of words, for small datasets of labelled texts.

Easy data augmentation (Wei and Zou, arXiv 1901.11196) without synonyms, which need a dictionary.

- Masking writes the tokenizer's mask token, else its unknown token, else it deletes the word.
- A text stays unchanged if it has one word, or if no word would remain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from megatrain.config.schema import Augment

Word = TypeVar("Word")


def split_words(text: str) -> list[str]:
    """Returns the words with the white space around them; joined they are the text."""
    return re.findall(r"\s*\S+\s*", text)


def mask_word(tokenizer: object) -> str | None:
    """Returns the replacement of a masked word; None if masked words are deleted."""
    return getattr(tokenizer, "mask_token", None) or getattr(tokenizer, "unk_token", None)


def augment(
    words: Sequence[Word],
    augmentation: Augment,
    *,
    share: float,
    key: Sequence[int],
    masked: Sequence[Word] | None,
) -> list[Word]:
    """Returns the words with about `share` of them deleted, swapped or masked.

    The result is a function of the arguments.

    Args:
        words: the words of a text.
        augmentation: the operation. `mix` draws one of the three for the text.
        share: the probability of a change of each word.
        key: at least two integers below 2**64 that seed the random numbers.
        masked: the replacement of each word when it is masked; None deletes it.
    """
    if augmentation == "none" or len(words) < 2:
        return list(words)
    generator = np.random.Generator(np.random.Philox(key=np.array(key[:2], dtype=np.uint64)))
    if augmentation == "mix":
        augmentation = ("delete", "swap", "mask")[int(generator.integers(3))]
    selected = generator.random(len(words)) < share
    if augmentation == "swap":
        return _swap(words, selected, generator)
    if augmentation == "mask" and masked is not None:
        return [
            mask if change else word
            for word, mask, change in zip(words, masked, selected, strict=True)
        ]
    kept = [word for word, change in zip(words, selected, strict=True) if not change]
    return kept or list(words)


def _swap(
    words: Sequence[Word], selected: np.ndarray, generator: np.random.Generator
) -> list[Word]:
    result = list(words)
    for index in np.flatnonzero(selected):
        other = int(generator.integers(len(result)))
        result[index], result[other] = result[other], result[index]
    return result
