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
"""What each rule keeps for an element, beside the weight itself."""


LANES = 16
"""fp32 elements in a CPU's widest registers: torch's fused rules round what is left over at the end of a tensor in another way."""


def decays(parameter: nn.Parameter, config: OptimizerConfig) -> bool:
    """Whether weight decay is the parameter's."""
    kind = shard_spec(parameter).kind
    return kind == "matrix" or (kind == "embedding" and config.decay_embeddings)


def decay_groups(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Two groups: matrices (and embeddings where asked) decay; biases and norms do not, as in GPT-2 and Llama."""
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
    """Whether first and last stage hold a copy each: a tied matrix."""
    return any(axis.name == "embedding_group" for axis in shard_spec(parameter).grad_reduce_axes)


def lane_padding(group: Sequence[nn.Parameter], *, shards: int) -> int:
    """Elements to add to a group with a tied matrix, so that no share of it has a rest: both ends then update their copies to the same bits."""
    return (
        -sum(parameter.numel() for parameter in group) % (LANES * shards)
        if any(map(is_at_both_ends, group))
        else 0
    )


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's own rules in their fused kernels; fp32 states."""
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
