"""Bytes of a stage's weights, gradients and optimizer on each rank, by ZeRO stage and offload.

With N trained elements, D data ranks, s fp32 states of the optimizer, and 2 bytes per weight (4 in
fp32, where 2 N below is 4 N). ZeRO (arXiv 1910.02054, section 3) has 2, 2 and 12 bytes per element;
here gradients accumulate in fp32.

    zero    weights     gradients    optimizer          temporaries of reduction and update
    0       2 N         4 N          4 (1 + s) N        messages of BUCKET elements
    1       2 N         4 N          4 (1 + s) N / D    fp32 and fp16: 4 N / D more
    2       2 N         4 N / D      4 (1 + s) N / D    a bucket, and gradients copied into it
    3       2 N / D     4 N / D      4 (1 + s) N / D    a bucket, and gathered weights, up to 1e9

Frozen weights have the first column only. tests/planner/test_memory.py compares weights, gradients
and optimizer with the storages of real ranks, byte for byte. The last column is an estimate from
the allocations of DeepSpeed 0.19.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from megatrain.config.schema import OptimizerConfig
from megatrain.ops.dtypes import DTYPES
from megatrain.optim import zero_engine
from megatrain.optim.param_groups import STATES, decay_groups, lane_padding

MAX_GATHERED = 1_000_000_000
"""Elements of weights that ZeRO 3 keeps gathered (stage3_max_live_parameters)."""
PREFETCH = 50_000_000
"""Elements of weights that ZeRO 3 gathers ahead (stage3_prefetch_bucket_size)."""


class StateSizes(NamedTuple):
    """Bytes on a rank.

    Attributes:
        host: bytes in CPU memory, with offload.
        buffers: buffers that exist beside activations, in forwards and backwards.
        update: temporaries of gradient reduction and update.
    """

    weights: int
    gradients: int
    optimizer: int
    host: int
    buffers: int
    update: int


class _Settings(NamedTuple):
    """Settings that determine DeepSpeed's buffers."""

    dtype: str
    zero: int
    offload: bool

    @property
    def weight_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def flat_gradients(self) -> bool:
        """Gradients accumulate in DeepSpeed's flat buffers."""
        return self.dtype == "bf16" and not self.offload


def state_sizes(
    stage: nn.Module,
    *,
    optimizer: OptimizerConfig,
    dtype: str,
    zero: int,
    offload: bool,
    data_size: int,
) -> StateSizes:
    """Returns the sizes of a stage on any device, with adapters and without 4-bit weights."""
    settings = _Settings(dtype, zero, offload)
    width, shards = settings.weight_bytes, data_size if zero else 1
    params = list(stage.parameters())
    frozen = [param.numel() for param in params if not param.requires_grad]
    groups = _group_sizes(params, optimizer, shards)
    elements = _padded_each(groups, shards) if zero == 3 else _padded_flat(groups, shards)
    shard = elements // shards
    counters = 4 * len(groups) if optimizer.name in ("adam", "adamw") else 0
    states = 4 * (1 + len(STATES[optimizer.name])) * shard + counters
    weights = width * (elements + sum(frozen))
    if zero == 3:
        weights = width * (shard + sum(-(-numel // shards) for numel in frozen))
    if zero >= 2:
        gradients = 4 * shard
    else:
        gradients = 4 * (elements if settings.flat_gradients else sum(map(sum, groups)))
    buffers, update = _temporaries(settings, groups, shard, sum(frozen))
    host = 0
    if offload:
        host, states = states + 4 * shard, 0  # with the gradients of the update
        largest = max(map(max, groups))
        if zero < 3:
            host += width * (shard + largest)
            buffers += width * largest
        else:
            host, gradients = host + gradients, 0
    return StateSizes(weights, gradients, states, host, buffers, update)


def _group_sizes(
    params: list[nn.Parameter], optimizer: OptimizerConfig, shards: int
) -> list[list[int]]:
    """Returns the elements of each trained parameter and the padding, by parameter group."""
    trained = [param for param in params if param.requires_grad]
    groups = [group["params"] for group in decay_groups(trained, optimizer)]
    sizes = [
        [*(param.numel() for param in group), lane_padding(group, shards=shards)]
        for group in groups
    ]
    return sizes or [[1]]  # DeepSpeed gets one element if all parameters are frozen


def _padded_flat(groups: list[list[int]], shards: int) -> int:
    """Returns the elements of groups that are flattened and padded to twice the shards."""
    return sum(-(-sum(group) // (2 * shards)) * 2 * shards for group in groups)


def _padded_each(groups: list[list[int]], shards: int) -> int:
    """Returns the elements of groups whose parameters are padded one by one."""
    return sum(-(-numel // shards) * shards for group in groups for numel in group)


def _temporaries(
    settings: _Settings, groups: list[list[int]], shard: int, frozen: int
) -> tuple[int, int]:
    """Returns the bytes of buffers and of the update's temporaries; see `StateSizes`."""
    width, bucket = settings.weight_bytes, zero_engine.BUCKET
    trained, largest = sum(map(sum, groups)), max(map(max, groups))
    message = min(trained, max(bucket, largest))
    if settings.zero == 3:
        gathered = min(trained + frozen, MAX_GATHERED) + min(trained + frozen, PREFETCH)
        return width * gathered + (4 if width == 4 else width) * bucket, 4 * shard
    if settings.zero == 2:
        return width * (bucket + message), 4 * shard + width * message
    if settings.flat_gradients:
        is_joined = sum(groups[0]) <= bucket and len(groups) > 1
        messages = 4 * 2 * message if settings.zero == 0 else 0
        return 0, max(messages, 4 * trained if is_joined else 0)
    clones = 4 * trained if width == 2 else 0
    offload_bucket = width * bucket if settings.offload else 0
    return offload_bucket, clones + offload_bucket + max(4 * shard, 4 * min(trained, bucket))
