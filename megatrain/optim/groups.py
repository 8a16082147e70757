"""The update rule and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from megatrain.optim.lion import Lion
from megatrain.parallel.sharding import sharding
from megatrain.settings import Optimizer

STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",), "lion": ("exp_avg",)}
"""What each rule keeps for an element, beside the weight itself."""


def decays(parameter: nn.Parameter, config: Optimizer) -> bool:
    """Whether weight decay is the parameter's."""
    kind = sharding(parameter).kind
    return kind == "matrix" or (kind == "embedding" and config.decay_embeddings)


def decay_groups(parameters: Iterable[nn.Parameter], config: Optimizer) -> list[dict[str, Any]]:
    """Two groups: matrices (and embeddings where asked) decay; biases and norms do not, as in GPT-2 and Llama."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if decays(parameter, config) else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], config: Optimizer) -> torch.optim.Optimizer:
    """torch's own rules in their fused kernels; fp32 states."""
    betas = (config.betas[0], config.betas[1])
    rules: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True),
        "adam": lambda: torch.optim.Adam(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True),
        "sgd": lambda: torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True),
        "lion": lambda: Lion(groups, lr=config.lr, betas=betas),
    }
    return rules[config.name]()
