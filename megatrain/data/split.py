"""The split of a dataset into training, validation and test documents, such as "98,1,1"."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

from megatrain.errors import ConfigError

Part = Literal["train", "valid"]
_PARTS = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """Returns the shares of train, valid and test, which sum to 1; missing ones are 0.

    Raises:
        ConfigError: the text is not one to three such numbers.
    """
    error = ConfigError(
        "data.split",
        split,
        "must be one to three numbers of at least 0, with a sum above 0",
        'the shares of train, valid and test, such as "98,1,1"',
        fix={"data.split": "98,1,1"},
    )
    try:
        shares = [float(part) for part in str(split).split(",")]
    except ValueError:
        raise error from None
    total = sum(shares)
    if len(shares) > 3 or min(shares) < 0 or not 0 < total < float("inf"):
        raise error
    train, valid, test = (*(share / total for share in shares), 0.0, 0.0)[:3]
    return train, valid, test


def split_documents(num_documents: int, *, split: str, part: Part) -> tuple[int, int]:
    """Returns the documents [first, last) of one part.

    Parts are contiguous and rounded as in Megatron-LM (blended_megatron_dataset_config.py), so
    that the same split of the same files selects the same documents.
    """
    bounds = [0, *(round(share * num_documents) for share in accumulate(parse_split(split)))]
    index = _PARTS.index(part)
    if bounds[index] == bounds[index + 1]:
        raise ConfigError(
            "data.split",
            split,
            f"gives none of the {num_documents} documents to {part}",
            "make its share larger",
            fix={"data.split": "90,10"} if num_documents >= 10 else None,
        )
    return bounds[index], bounds[index + 1]
