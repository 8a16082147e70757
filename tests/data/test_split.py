"""The split of a dataset by documents."""

from __future__ import annotations

import pytest

from megatrain.data.split import parse_split, split_documents
from megatrain.errors import ConfigError


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        ("98,1,1", (0.98, 0.01, 0.01)),
        ("9,1", (0.9, 0.1, 0)),
        ("1", (1, 0, 0)),
        (" 0.5, .5 ,0", (0.5, 0.5, 0)),
    ],
)
def test_shares(split, shares):
    assert parse_split(split) == pytest.approx(shares)


@pytest.mark.parametrize(
    "split", ["", "a,b", "98;1;1", "1,1,1,1", "-1,2", "0,0,0", "nan,1", "inf,1", "98,,1"]
)
def test_invalid_split_is_refused(split):
    with pytest.raises(ConfigError, match=r"^data\.split=.* must be one to three numbers"):
        parse_split(split)


def test_parts_are_contiguous_and_rounded_as_megatron_rounds():
    assert split_documents(1000, split="969,30,1", part="train") == (0, 969)
    assert split_documents(1000, split="969,30,1", part="valid") == (969, 999)
    assert split_documents(33, split="98,2", part="train") == (0, 32)
    assert split_documents(33, split="98,2", part="valid") == (32, 33)


def test_an_empty_part_is_refused():
    with pytest.raises(
        ConfigError, match=r"data\.split=98,1,1 gives none of the 10 documents to valid"
    ):
        split_documents(10, split="98,1,1", part="valid")
