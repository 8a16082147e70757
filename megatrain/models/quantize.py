"""Quantizes the frozen linears of the blocks to 4 bits as their weights are read.

A rank holds at most one linear unquantized at a time. Embeddings, norms, biases and the head stay
as they are, as in transformers with bitsandbytes' 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import torch
from torch import nn

from megatrain.config.schema import LoraConfig
from megatrain.distributed.sharding import ShardSpec, set_shard_spec, shard_spec
from megatrain.distributed.tensor_parallel import ColumnParallelLinear
from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig
from megatrain.models.params import can_split, in_features
from megatrain.ops.nf4 import BLOCK, NF4Weight

MIN_BITSANDBYTES = (0, 50)
"""The oldest tested version; earlier ones have another CPU implementation."""

_ROW_PARALLEL = ("out", "down")


@torch.no_grad()
def quantize_linears(
    stage: nn.Module, *, device: torch.device, fill: Callable[[ShardSpec, nn.Parameter], None]
) -> None:
    """Replaces the weights of a stage's linears, which are on the meta device, by NF4 weights.

    Args:
        fill: writes the values of a weight.
    """
    for module in stage.modules():
        if isinstance(module, ColumnParallelLinear):
            meta, spec = module.weight, shard_spec(module.weight)
            tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
            weight = set_shard_spec(nn.Parameter(tensor, requires_grad=False), spec)
            fill(spec, weight)
            del module.weight
            module.weight = NF4Weight(weight.detach(), spec)


def quantized_weights(module: nn.Module) -> list[NF4Weight]:
    """Returns the module's NF4 weights."""
    weights = (
        child.weight for child in module.modules() if isinstance(child, ColumnParallelLinear)
    )
    return [weight for weight in weights if isinstance(weight, NF4Weight)]


def quantized_bytes(module: nn.Module) -> int:
    """Returns the memory of the module's NF4 weights."""
    return sum(weight.nbytes for weight in quantized_weights(module))


def check_blocks(architecture: TransformerConfig, settings: LoraConfig, tensor: int) -> None:
    """Raises ConfigError if a rank's rows are not complete blocks: values would depend on the
    layout."""
    if settings.quantize == "none" or _has_full_blocks(architecture, tensor):
        return
    widths = ", ".join(f"{name}={size}" for name, size in _widths(architecture).items())
    sizes = [
        t
        for t in range(1, architecture.num_heads + 1)
        if _has_full_blocks(architecture, t) and can_split(architecture, t)
    ]
    raise ConfigError(
        "lora.quantize",
        settings.quantize,
        f"requires rows of complete blocks of {BLOCK} values on each rank, and with "
        f"parallel.tensor={tensor} a rank's part of the rows ({widths}) is not",
        f"parallel.tensor={' or '.join(map(str, sizes))} also works" if sizes else "",
        fix={"lora.quantize": "none"},
    )


def check_bitsandbytes(settings: LoraConfig) -> None:
    """Raises ConfigError if 4 bits are set and bitsandbytes is missing or too old.

    It reads the installed version without importing bitsandbytes, since the import initialises the
    GPUs.
    """
    if settings.quantize == "none":
        return
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        version = None
    if version is None or tuple(int(part) for part in version.split(".")[:2]) < MIN_BITSANDBYTES:
        raise ConfigError(
            "lora.quantize",
            settings.quantize,
            f"needs bitsandbytes {'.'.join(map(str, MIN_BITSANDBYTES))} or newer; "
            f"installed: {version or 'none'}",
            "or install it: pip install 'megatrain[qlora]'",
            fix={"lora.quantize": "none"},
        )


def _widths(a: TransformerConfig) -> dict[str, int]:
    return {
        "hidden_size": a.hidden_size,
        "heads x head_dim": in_features(a, "out"),
        "intermediate_size": in_features(a, "down"),
    }


def _has_full_blocks(a: TransformerConfig, tensor: int) -> bool:
    return a.hidden_size % BLOCK == 0 and all(
        in_features(a, role) % (BLOCK * tensor) == 0 for role in _ROW_PARALLEL
    )
