"""What a model's arithmetic costs and what a device could do: the two sides of model FLOPs utilisation.

Model FLOPs are those of the forward and backward as written down, whatever recomputation adds: PaLM (Chowdhery et al.
2022), appendix B. Megatron-LM (Narayanan et al., SC 2021), equation 3, counts the same products, with whole attention
matrices and one more forward for full recomputation.
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
from megatrain.models.params import ParamFactory
from megatrain.models.transformer import build_layers, layer_specs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def flops_per_token(
    config: PreTrainedConfig, *, sequence_length: int, frozen: bool = False, head: bool = True
) -> float:
    """FLOPs of one token's forward and backward in a sequence of `sequence_length`.

    6 for each weight that multiplies activations: 2 forward, 4 backward. Embedding lookups, norms and biases are no
    matrix products and count nothing; the head counts whether tied or not, and a classifier's (no `head`) is as good as
    nothing. Scores and their use cost 12 x query width x sequence, half of it as a token sees on average half of the sequence.
    `frozen` weights have no gradient and cost 4; the adapters beside them, a percent or less, are left out.
    """
    a = read_config(config)
    seen = sum(_tokens_seen(a.window(layer), sequence_length) for layer in range(a.num_layers))
    weights = matrix_weights(config) - (0 if head else a.hidden_size * a.vocab_size)
    return (4.0 if frozen else 6.0) * weights + 12.0 * a.num_heads * a.head_dim * seen


def matrix_weights(config: PreTrainedConfig) -> int:
    """Weights of all matrix products: each layer's projections, and the head."""
    a = read_config(config)
    return a.num_layers * _block_weights(a) + a.hidden_size * a.vocab_size


def _block_weights(a: TransformerConfig) -> int:
    attention = a.hidden_size * a.head_dim * 2 * (a.num_heads + a.num_kv_heads)
    return attention + a.hidden_size * a.intermediate_size * (3 if a.gated else 2)


def _tokens_seen(window: int | None, sequence_length: int) -> float:
    """Tokens that a token attends to on average: half of the sequence, less with a sliding window."""
    if window is None or window >= sequence_length:
        return sequence_length / 2
    # The first `window` tokens see half of the window on average, all later ones the whole of it.
    return window - window * window / (2 * sequence_length)


def layer_costs(model_config: TransformerConfig, sequence_length: int) -> list[float]:
    """Returns the multiplications per token of each layer's forward pass, from embedding to head.

    The embedding is a lookup and costs one operation per hidden unit.
    """
    c = model_config
    block = _block_weights(c) + c.num_heads * c.head_dim * sequence_length
    return [
        float(c.hidden_size),
        *[float(block)] * c.num_layers,
        float(c.hidden_size * c.vocab_size),
    ]


def count_parameters(model_config: TransformerConfig) -> int:
    """Returns the number of parameters of the model, without padding."""
    return count_module_parameters(_complete_model(model_config))[1]


def parameter_shapes(model_config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of each tensor of the model, as checkpoints store them."""
    return {spec.name: spec.shape for spec, _ in parameters(_complete_model(model_config))}


def count_adapter_parameters(model_config: TransformerConfig, lora: LoraConfig) -> int:
    """Returns the number of trained parameters of the model with LoRA adapters."""
    model = _complete_model(model_config)
    add_adapters(model, model_config, lora, make_mesh(0, connect=False).tensor)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_module_parameters(module: torch.nn.Module) -> tuple[int, int]:
    """Returns the elements that a module stores, and those that it owns.

    The owned elements of all ranks add up to the model: replicated tensors count on one rank only,
    padding nowhere.
    """
    stored = owned = 0
    for spec, parameter in parameters(module):
        stored += parameter.numel()
        if spec.is_owner:
            owned += math.prod(spec.part_shape())
    return stored, owned


def _complete_model(model_config: TransformerConfig) -> torch.nn.Module:
    """Builds all layers for a single rank on the meta device."""
    factory = ParamFactory(
        model_config,
        make_mesh(0, connect=False),
        sequence=False,
        dtype=torch.float32,
        device="meta",
    )
    return build_layers(layer_specs(model_config), factory, recompute="none")


# Dense peaks in FLOP/s, without sparsity and TF32, from the makers' data sheets. The first name found as words in the
# device's own name counts, so special forms stand before the plain one.
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


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The device's dense peak for `dtype` (fp32, bf16, fp16); None for devices not in the table, such as CPUs."""
    for name, peaks in _PEAKS:
        if re.search(rf"\b{name}\b", device_name, re.IGNORECASE):  # A100 is no RTX A1000
            return peaks.get(dtype)
    return None
