"""Cut one data set into training and validation documents: the "98,1,1" of Megatron-LM."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

from megatrain.errors import ConfigError

Part = Literal["train", "valid"]
_PARTS = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """Return the shares of train, valid and test, which sum to 1; missing ones are 0. Raises ConfigError."""
    rule = "must be one to three numbers, none negative and not all 0"
    way_out = 'write it as "98,1,1" for train, valid and test'
    try:
        shares = [float(part) for part in str(split).split(",")]
    except ValueError:
        raise ConfigError("data.split", split, rule, way_out) from None
    total = sum(shares)
    if len(shares) > 3 or min(shares) < 0 or not 0 < total < float("inf"):
        raise ConfigError("data.split", split, rule, way_out)
    train, valid, test = (*(share / total for share in shares), 0.0, 0.0)[:3]
    return train, valid, test


def split_documents(num_documents: int, *, split: str, which: Part) -> tuple[int, int]:
    """Return the documents [first, last) of one part.

    Parts are contiguous and rounded as Megatron-LM rounds them (blended_megatron_dataset_config.py), so that the same
    split of the same files leaves out the same documents.
    """
    bounds = [0, *(round(share * num_documents) for share in accumulate(parse_split(split)))]
    part = _PARTS.index(which)
    if bounds[part] == bounds[part + 1]:
        raise ConfigError(
            "data.split",
            split,
            f"gives none of the {num_documents} documents to {which}",
            "make its share larger",
        )
    return bounds[part], bounds[part + 1]
