"""The update rule and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from megatrain.config.schema import OptimizerConfig
from megatrain.distributed.sharding import shard_spec
from megatrain.optim.lion import Lion

STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
}
"""Moments that each update rule keeps for every element."""

LANES = 16
"""fp32 elements in a CPU's widest registers.

torch's fused update rules round the remainder at the end of a tensor differently.
"""


def decays(parameter: nn.Parameter, config: OptimizerConfig) -> bool:
    """Returns True if weight decay applies to the parameter."""
    kind = shard_spec(parameter).kind
    return kind == "matrix" or (kind == "embedding" and config.decay_embeddings)


def decay_groups(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Returns two groups: matrices (and optionally embeddings) decay, biases and norms do not.

    As in GPT-2 and Llama. Empty groups are left out.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if decays(parameter, config) else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_at_both_ends(parameter: nn.Parameter) -> bool:
    """Returns True for a tied matrix, of which first and last stage hold a copy each."""
    return any(axis.name == "embedding_group" for axis in shard_spec(parameter).grad_reduce_axes)


def lane_padding(group: Sequence[nn.Parameter], *, shards: int) -> int:
    """Returns the elements to add to a group with a tied matrix so that no shard has a remainder.

    Both ends then update their copies to the same bits.
    """
    if not any(map(is_at_both_ends, group)):
        return 0
    return -sum(parameter.numel() for parameter in group) % (LANES * shards)


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Returns the optimizer: torch's fused implementations, or Lion."""
    betas = (config.betas[0], config.betas[1])
    rules: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(
            groups, lr=config.lr, betas=betas, eps=config.eps, fused=True
        ),
        "adam": lambda: torch.optim.Adam(
            groups, lr=config.lr, betas=betas, eps=config.eps, fused=True
        ),
        "sgd": lambda: torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True),
        "lion": lambda: Lion(groups, lr=config.lr, betas=betas),
    }
    return rules[config.name]()
