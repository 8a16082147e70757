"""The dtypes that weights and activations can have."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By their names in `train.dtype`."""
