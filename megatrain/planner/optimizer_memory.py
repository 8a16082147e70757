"""What a stage's weights, gradients and optimizer take on each rank, in bytes, under each ZeRO stage and with offload.

With N trained elements, D data ranks and s fp32 states of the rule, and 4 bytes an element of the run's dtype in fp32, else 2 (ZeRO,
arXiv 1910.02054, section 3, says 2, 2 and 12; we accumulate in fp32):

    zero    weights     gradients        optimizer          while gradients are reduced and the update is made
    0       2 N         4 N              4 (1 + s) N        messages of BUCKET elements
    1       2 N         4 N              4 (1 + s) N / D    fp32 and fp16: 4 N / D more
    2       2 N         4 N / D          4 (1 + s) N / D    a bucket, and gradients on their way into it
    3       2 N / D     4 N / D          4 (1 + s) N / D    a bucket, and weights gathered, up to a thousand million of them

Frozen weights have the first column alone. tests/planner/test_memory.py holds weights, gradients and optimizer to the storages of real
ranks, byte for byte; the last column is an estimate, from where DeepSpeed 0.19 allocates.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from megatrain.config.loader import Config
from megatrain.ops.dtypes import DTYPES
from megatrain.optim import zero
from megatrain.optim.param_groups import STATES, decay_groups, lane_padding

MOST_GATHERED = 1_000_000_000
"""Elements of weights that DeepSpeed's ZeRO 3 keeps gathered (its stage3_max_live_parameters)."""
AHEAD = 50_000_000
"""Elements that it gathers ahead (its stage3_prefetch_bucket_size)."""


class StateSizes(NamedTuple):
    """Bytes on a rank. `host` is the optimizer under offload: in CPU memory and not on the device.

    Attributes:
        buffers: beside activations while forwards and backwards run.
        update: beside weights, gradients and optimizer while gradients are reduced and the update is made.
    """

    weights: int
    gradients: int
    optimizer: int
    host: int
    buffers: int
    update: int


def state_sizes(stage: nn.Module, config: Config, *, data_size: int) -> StateSizes:
    """Of a stage that was built, on any device, meta too; adapters included, and without weights in 4 bits."""
    stage_parameters = list(stage.parameters())
    trained = [parameter for parameter in stage_parameters if parameter.requires_grad]
    frozen = sum(parameter.numel() for parameter in stage_parameters if not parameter.requires_grad)
    width, shards = DTYPES[config.train.dtype].itemsize, data_size if config.parallel.zero else 1
    held = [group["params"] for group in decay_groups(trained, config.optimizer)]
    groups = [
        [*(parameter.numel() for parameter in group), lane_padding(group, shards=shards)]
        for group in held
    ] or [[1]]  # else a stand-in
    rest = _whole if config.parallel.zero == 3 else _flat
    elements = rest(groups, shards)
    counters = 4 * len(groups) if config.optimizer.name in ("adam", "adamw") else 0
    states = 4 * (1 + len(STATES[config.optimizer.name])) * (elements // shards) + counters
    weights = width * (elements + frozen)
    if config.parallel.zero == 3:
        weights = width * (
            elements // shards
            + sum(-(-p.numel() // shards) for p in stage_parameters if not p.requires_grad)
        )
    exact = sum(map(sum, groups))
    if config.parallel.zero >= 2:
        gradients = 4 * (elements // shards)
    else:
        gradients = 4 * (elements if _keeps_own(config) else exact)
    largest = max(map(max, groups))
    buffers, update = _at_work(config, groups, elements // shards, largest, width, frozen)
    host = 0
    if config.parallel.offload == "cpu":
        host = states + 4 * (elements // shards)  # the update's gradients are there too
        states = 0
        if config.parallel.zero < 3:
            host += width * (elements // shards + largest)
            buffers += width * largest
        else:
            host, gradients = host + gradients, 0
    return StateSizes(weights, gradients, states, host, buffers, update)


def _keeps_own(config: Config) -> bool:
    """Whether gradients accumulate in DeepSpeed's flat buffers."""
    return config.train.dtype == "bf16" and config.parallel.offload == "none"


def _flat(groups: list[list[int]], shards: int) -> int:
    """Elements of the groups, each flattened and padded so that it divides by twice the shards."""
    return sum(-(-sum(group) // (2 * shards)) * 2 * shards for group in groups)


def _whole(groups: list[list[int]], shards: int) -> int:
    """Elements where each parameter is padded by itself."""
    return sum(-(-numel // shards) * shards for group in groups for numel in group)


def _at_work(
    config: Config, groups: list[list[int]], share: int, largest: int, width: int, frozen: int
) -> tuple[int, int]:
    """Buffers, and what the update takes; see `StateSizes`."""
    everything, level, offload = (
        sum(map(sum, groups)),
        config.parallel.zero,
        config.parallel.offload == "cpu",
    )
    message = min(everything, max(zero.BUCKET, largest))
    if level == 3:
        gathered = min(everything + frozen, MOST_GATHERED) + min(everything + frozen, AHEAD)
        return width * gathered + (4 if width == 4 else width) * zero.BUCKET, 4 * share
    if level == 2:
        return width * (zero.BUCKET + message), 4 * share + width * message
    if _keeps_own(config):
        joined = sum(groups[0]) <= zero.BUCKET and len(groups) > 1
        own = 4 * 2 * message if level == 0 else 0
        return 0, max(own, 4 * everything if joined else 0)
    clones = 4 * everything if width == 2 else 0
    bucket = width * zero.BUCKET if offload else 0
    return bucket, clones + bucket + max(4 * share, 4 * min(everything, zero.BUCKET))
