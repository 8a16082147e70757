"""A part's regions: the drawing of `Sharding`, and parts put together again."""

import pytest
import torch

from megatrain.distributed.sharding import ShardSlice, ShardSpec

# One of two tensor ranks, 4 heads in all, 2 wide: | q0 k0 v0 | q1 k1 v1 | q2 k2 v2 | q3 k3 v3 |
KEYS = ShardSpec(
    "query_key_value.weight", (24, 5), 0, start=7 * 2, length=2 * 2, block=2, block_stride=3 * 2
)


def test_strided_blocks_are_slices_of_full_rows():
    assert KEYS.slices() == [
        ShardSlice((slice(14, 16), slice(0, 5)), (slice(0, 2), slice(0, 5))),
        ShardSlice((slice(20, 22), slice(0, 5)), (slice(2, 4), slice(0, 5))),
    ]
    whole = torch.arange(24 * 5).view(24, 5)
    assert KEYS.shard(whole).tolist() == torch.cat([whole[14:16], whole[20:22]]).tolist()
    assert KEYS.shard_shape() == (4, 5)


def test_contiguous_shard_is_one_slice():
    everything = (slice(0, 6), slice(0, 4))
    assert ShardSpec("w", (6, 4)).slices() == [ShardSlice(everything, everything)]
    rows = ShardSpec("w", (6, 4), 0, 2, 3)
    assert rows.slices() == [ShardSlice((slice(2, 5), slice(0, 4)), (slice(0, 3), slice(0, 4)))]
    columns = ShardSpec("w", (6, 4), 1, 1, 2, transposed=True)
    assert columns.slices() == [ShardSlice((slice(0, 6), slice(1, 3)), (slice(0, 6), slice(0, 2)))]
    assert columns.local_view(torch.zeros(2, 6)).shape == columns.shard_shape() == (6, 2)


def test_empty_shard_has_no_slices():
    """The vocabulary's last rank may hold padding only."""
    nothing = ShardSpec("w", (6, 4), 0, 6, 0)
    assert nothing.slices() == []
    assert (
        nothing.shard(torch.zeros(6, 4)).shape
        == nothing.local_view(torch.zeros(3, 4)).shape
        == (0, 4)
    )


@pytest.mark.parametrize("dim", [0, 1])
def test_shard_and_unshard_restore_the_tensor(dim):
    whole = torch.randn(24, 24)
    parts = [
        ShardSpec("w", (24, 24), dim, start=role * 2 + rank * 12, length=4, block=2, block_stride=6)
        for role in range(3)
        for rank in range(2)
    ]
    rebuilt = torch.full_like(whole, float("nan"))
    for part in parts:
        part.unshard_into(part.shard(whole), rebuilt)
    assert torch.equal(rebuilt, whole)
