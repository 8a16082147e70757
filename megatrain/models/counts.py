"""Model FLOPs of a token and peak FLOP/s of devices: the two sides of model FLOPs utilisation.

Model FLOPs are those of one forward and backward, without recomputation: PaLM (Chowdhery et al.
2022), appendix B. Megatron-LM (Narayanan et al., SC 2021), equation 3, counts the same products,
but complete attention matrices and one more forward for full recomputation.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch

from megatrain.config.schema import LoraConfig
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.models.config import TransformerConfig, read_config
from megatrain.models.lora import add_adapters
from megatrain.models.transformer import build_meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def flops_per_token(
    config: PreTrainedConfig, *, sequence_length: int, frozen: bool = False, head: bool = True
) -> float:
    """Returns the FLOPs of one token's forward and backward in a sequence of `sequence_length`.

    Each weight of a matrix product costs 6: 2 in the forward, 4 in the backward. Embedding lookups,
    norms and biases are not counted. Attention scores and their product with values cost 12 x query
    width x tokens attended to, on average half of the sequence.

    Args:
        frozen: weights without a gradient cost 4. Adapters, at most a percent, are not counted.
        head: count the LM head, tied or not. A classification head is negligible.
    """
    a = read_config(config)
    seen = sum(_tokens_seen(a.window(layer), sequence_length) for layer in range(a.num_layers))
    weights = matrix_weights(config) - (0 if head else a.hidden_size * a.vocab_size)
    return (4.0 if frozen else 6.0) * weights + 12.0 * a.num_heads * a.head_dim * seen


def matrix_weights(config: PreTrainedConfig) -> int:
    """Returns the number of weights in matrix products: each block's linears, and the head."""
    a = read_config(config)
    return a.num_layers * _block_weights(a) + a.hidden_size * a.vocab_size


def _block_weights(a: TransformerConfig) -> int:
    attention = a.hidden_size * a.head_dim * 2 * (a.num_heads + a.num_kv_heads)
    return attention + a.hidden_size * a.intermediate_size * (3 if a.gated else 2)


def _tokens_seen(window: int | None, sequence_length: int) -> float:
    """Returns the mean number of tokens that a token attends to: at most half of the sequence."""
    if window is None or window >= sequence_length:
        return sequence_length / 2
    # The first `window` tokens attend to half of the window on average, later ones to all of it.
    return window - window * window / (2 * sequence_length)


def layer_costs(architecture: TransformerConfig, sequence_length: int) -> list[float]:
    """Returns the multiplications per token of each layer's forward, from embedding to head.

    The embedding is a lookup and costs one operation per hidden unit.
    """
    a = architecture
    block = _block_weights(a) + a.num_heads * a.head_dim * sequence_length
    return [
        float(a.hidden_size),
        *[float(block)] * a.num_layers,
        float(a.hidden_size * a.vocab_size),
    ]


def count_parameters(architecture: TransformerConfig) -> int:
    """Returns the number of parameters of the model, without padding."""
    return count_module_parameters(build_meta_model(architecture))[1]


def parameter_shapes(architecture: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of each tensor of the model, as checkpoints store them."""
    return {spec.name: spec.shape for spec, _ in parameters(build_meta_model(architecture))}


def count_adapter_parameters(architecture: TransformerConfig, lora: LoraConfig) -> int:
    """Returns the number of trained parameters of the model with LoRA adapters."""
    model = build_meta_model(architecture)
    add_adapters(model, architecture, lora, make_mesh(0, connect=False).tensor)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_module_parameters(module: torch.nn.Module) -> tuple[int, int]:
    """Returns the elements that a module stores, and those that it owns.

    The owned elements of all ranks add up to the model: replicated tensors count on one rank only,
    padding on none.
    """
    stored = owned = 0
    for spec, parameter in parameters(module):
        stored += parameter.numel()
        if spec.is_owner:
            owned += math.prod(spec.shard_shape())
    return stored, owned


_PEAKS: list[tuple[str, dict[str, float]]] = [
    ("B200", {"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12}),
    ("H100 PCIe", {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12}),
    ("H100 NVL", {"bf16": 835e12, "fp16": 835e12, "fp32": 60e12}),
    ("H100", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    ("H200", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    ("GH200", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    ("A100", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}),
    ("A10G", {"bf16": 70e12, "fp16": 70e12, "fp32": 35e12}),
    ("A40", {"bf16": 149.7e12, "fp16": 149.7e12, "fp32": 37.4e12}),
    ("L40S", {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12}),
    ("L40", {"bf16": 181e12, "fp16": 181e12, "fp32": 90.5e12}),
    ("L4", {"bf16": 121e12, "fp16": 121e12, "fp32": 30.3e12}),
    ("V100", {"fp16": 125e12, "fp32": 15.7e12}),
    ("T4", {"fp16": 65e12, "fp32": 8.1e12}),
    ("MI300X", {"bf16": 1307e12, "fp16": 1307e12, "fp32": 163e12}),
    ("MI250X", {"bf16": 383e12, "fp16": 383e12, "fp32": 48e12}),
]
"""Dense peaks in FLOP/s, without sparsity and TF32, from the vendors' data sheets.

The first entry whose name occurs in the device's name counts, so variants precede the plain model.
"""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Returns the device's dense peak for `dtype` (fp32, bf16, fp16); None for unknown devices and
    CPUs."""
    for name, peaks in _PEAKS:
        if re.search(rf"\b{name}\b", device_name, re.IGNORECASE):  # not A100 in RTX A1000
            return peaks.get(dtype)
    return None
