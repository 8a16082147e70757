"""Rotary positions (RoFormer, arXiv 2104.09864) with the scalings that Hugging Face configs
name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatrain.ops.rope import Rotation

if TYPE_CHECKING:
    from megatrain.models.config import TransformerConfig


class Frequencies(NamedTuple):
    """Radians a position for each pair of dims, in fp32, and the factor on cosines and sines."""

    inv_freq: Tensor
    factor: float


def frequencies(
    architecture: TransformerConfig, kind: str | None = None, *, length: int
) -> Frequencies:
    """Returns the frequencies of a kind of layer (`TransformerConfig.rope_kinds`).

    Args:
        length: tokens of a sequence. Only longrope reads it: it has other frequencies beyond the
            original length. It is the length of the complete sequence even if positions restart
            within it, so that all microbatches have the same frequencies.
    """
    parameters = architecture.config.rope_parameters
    parameters = parameters if kind is None else parameters[kind]
    if parameters.get("rope_type", "default") == "default":
        dim = architecture.rotary_dim or architecture.head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return Frequencies(1.0 / (parameters["rope_theta"] ** exponents), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        architecture.config, torch.device("cpu"), seq_len=length, layer_type=kind
    )
    return Frequencies(inv_freq.float(), float(factor))


def rotations(
    positions: Tensor, architecture: TransformerConfig, dtype: torch.dtype
) -> dict[str | None, Rotation]:
    """Returns the rotations of positions int64 [B, S] for each kind of layer; empty without
    RoPE."""
    if not architecture.rotary:
        return {}
    kinds = dict.fromkeys(architecture.rope_kind(layer) for layer in range(architecture.num_layers))
    by_kind = {kind: frequencies(architecture, kind, length=positions.shape[1]) for kind in kinds}
    return {
        kind: make_rotation(positions, inv_freq.to(positions.device), factor, dtype)
        for kind, (inv_freq, factor) in by_kind.items()
    }


def make_rotation(
    positions: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype
) -> Rotation:
    """Returns the rotation of positions int64 [B, S]; its angles are fp32 for every dtype."""
    angles = positions.t().float()[:, :, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)[:, :, None, :]
    return Rotation((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))
