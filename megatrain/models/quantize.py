"""Puts the frozen linears of the blocks into 4 bits as they are read: a rank never holds them whole in more than one linear at a time.

Embeddings, norms, biases and the head stay as they are, as in transformers with bitsandbytes' 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import torch
from torch import nn

from megatrain.config.schema import LoraConfig
from megatrain.distributed.sharding import ShardSpec, declare, shard_spec
from megatrain.distributed.tensor_parallel import ColumnParallelLinear
from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig
from megatrain.models.params import check_tensor_split, in_features
from megatrain.ops.nf4 import BLOCK, NF4Weight

OLDEST = (0, 50)
"""Of bitsandbytes: what came before was not tried here, and its kernels for CPUs are another implementation."""

_BY_ROWS = ("out", "down")


@torch.no_grad()
def quantize_linears(
    stage: nn.Module, *, device: torch.device, fill: Callable[[ShardSpec, nn.Parameter], None]
) -> None:
    """Replace the weights of the stage's linears, which were made without memory, by NF4 of what `fill` writes into each."""
    for module in stage.modules():
        if isinstance(module, ColumnParallelLinear):
            empty, declaration = module.weight, shard_spec(module.weight)
            whole = declare(
                nn.Parameter(
                    torch.empty(empty.shape, dtype=empty.dtype, device=device), requires_grad=False
                ),
                declaration,
            )
            fill(declaration, whole)
            del module.weight
            module.weight = NF4Weight(whole.detach(), declaration)


def quantized_weights(module: nn.Module) -> list[NF4Weight]:
    """The module's weights that are no parameters."""
    weights = (
        child.weight for child in module.modules() if isinstance(child, ColumnParallelLinear)
    )
    return [weight for weight in weights if isinstance(weight, NF4Weight)]


def quantized_bytes(module: nn.Module) -> int:
    """Of the module's weights that are no parameters."""
    return sum(weight.nbytes for weight in quantized_weights(module))


def check_blocks(architecture: TransformerConfig, settings: LoraConfig, tensor: int) -> None:
    """Refuse rows that are not whole blocks on every tensor rank: their values would depend on the layout."""
    if settings.quantize != "none" and not _fits(architecture, tensor):
        widths = ", ".join(f"{name}={size}" for name, size in _widths(architecture).items())
        fits = [
            str(t)
            for t in range(1, architecture.num_heads + 1)
            if _fits(architecture, t) and _splits(architecture, t)
        ]
        way_out = (
            f"use parallel.tensor={' or '.join(fits)}, or lora.quantize=none"
            if fits
            else "leave it out"
        )
        raise ConfigError(
            "lora.quantize",
            settings.quantize,
            f"scales {BLOCK} neighbours of a row together, and with parallel.tensor={tensor} a rank's part "
            f"of the rows ({widths}) is not whole blocks",
            way_out,
            fix={"lora.quantize": "none"},
        )


def check_bitsandbytes(settings: LoraConfig) -> None:
    """Refuse 4 bits without bitsandbytes. Looks at what is installed and imports nothing: the import takes hold of the GPUs."""
    if settings.quantize == "none":
        return
    try:
        there = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        there = None
    if there is None or tuple(int(part) for part in there.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        rule = f"needs bitsandbytes {oldest} or newer, and {there or 'none'} is installed"
        raise ConfigError(
            "lora.quantize",
            settings.quantize,
            rule,
            "pip install 'megatrain[qlora]', or lora.quantize=none, which holds the base in train.dtype",
            fix={"lora.quantize": "none"},
        )


def _widths(a: TransformerConfig) -> dict[str, int]:
    return {
        "hidden_size": a.hidden_size,
        "heads x head_dim": in_features(a, "out"),
        "intermediate_size": in_features(a, "down"),
    }


def _fits(a: TransformerConfig, tensor: int) -> bool:
    return a.hidden_size % BLOCK == 0 and all(
        in_features(a, role) % (BLOCK * tensor) == 0 for role in _BY_ROWS
    )


def _splits(a: TransformerConfig, tensor: int) -> bool:
    try:
        check_tensor_split(a, tensor)
    except ConfigError:
        return False
    return True
