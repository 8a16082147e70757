"""What a model's arithmetic costs and what a device could do: the two sides of model FLOPs utilisation.

Model FLOPs are those of the forward and backward as written down, whatever recomputation adds: PaLM (Chowdhery et al.
2022), appendix B. Megatron-LM (Narayanan et al., SC 2021), equation 3, counts the same products, with whole attention
matrices and one more forward for full recomputation.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def flops_per_token(config: PreTrainedConfig, *, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward in a sequence of `sequence_length`.

    6 for each weight that multiplies activations: 2 forward, 4 backward. Embedding lookups, norms and biases are no
    matrix products and count nothing; the head counts whether tied or not. Scores and their use cost 12 x query width
    x sequence, half of it as a token sees on average half of the sequence.
    """
    query = config.num_attention_heads * head_dim(config)
    seen = _tokens_seen(config, sequence_length)
    return 6.0 * matrix_weights(config) + sum(12.0 * query * tokens for tokens in seen)


def matrix_weights(config: PreTrainedConfig) -> int:
    """Weights of all matrix products: each layer's projections, and the head."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = hidden * head_dim(config) * (2 * heads + 2 * key_value_heads)
    inner, gated = _feedforward(config)
    return config.num_hidden_layers * (attention + hidden * inner * (3 if gated else 2)) + hidden * config.vocab_size


def head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head; some families (Qwen3) do not derive it from the hidden size."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _feedforward(config: PreTrainedConfig) -> tuple[int, bool]:
    """Its inner width, and whether a gate makes it three matrices (SwiGLU) instead of two (GPT-2)."""
    if config.model_type == "gpt2":
        return config.n_inner or 4 * config.hidden_size, False
    return config.intermediate_size, True


def _tokens_seen(config: PreTrainedConfig, sequence_length: int) -> list[float]:
    """Tokens that a token attends to on average, for each layer: half of the sequence, less with a sliding window."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    full = sequence_length / 2
    if not window or window >= sequence_length:
        return [full] * config.num_hidden_layers
    # The first `window` tokens see half of the window on average, all later ones the whole of it.
    slid = window - window * window / (2 * sequence_length)
    return [slid if kind == "sliding_attention" else full for kind in types]


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
