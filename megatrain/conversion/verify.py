"""Proof that a written folder is the model it was made from: every tensor's hash, and logits of two implementations.

A Hugging Face folder is computed by transformers and what it was made from by the layers that train, or, for a Megatron-LM
checkpoint, by a decoder that works on Megatron's own tensors; a checkpoint of ours is computed by our layers and its source by
transformers. So names, splits, transposes and config are proven by code that knows nothing of the conversion. Where the dtype
is lowered the source is rounded to it first, which leaves the same bound, and the whole difference is reported beside it.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.tensor_io import raw_bytes
from megatrain.conversion.logits import fixed_prompts, our_logits, transformers_logits
from megatrain.conversion.sources import CastTensors, Readable, Source, row_blocks_of
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig

BOUND = 2e-5
"""Largest difference of two fp32 implementations, as a share of the largest logit (at least 1)."""

WEIGHT_BOUND = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Largest relative change of a weight by rounding to nearest; below fp16's smallest normal number, 6.1e-5, it may be more."""


@runtime_checkable
class ComputesItself(Protocol):
    """A source with a forward of its own, from its tensors as they lie there; `own_code` says by whom."""

    own_code: str

    def own_logits(self, tokens: Tensor, dtype: torch.dtype | None) -> Tensor: ...


class VerificationResult(NamedTuple):
    """What was found equal, as conversion.json keeps it.

    Attributes:
        max_logit_difference, bound: between source (in the target's dtype) and target.
        rounding_difference: between the source in its own dtype and the target; None when the dtype is the source's.
    """

    tensors: int
    max_logit_difference: float
    bound: float
    largest_logit: float
    prompts: tuple[int, ...]
    source_computed_by: str
    target_computed_by: str
    rounding_difference: float | None = None


def check_bytes(
    written: Readable, source: Readable, names: list[str], path: Path
) -> dict[str, str]:
    """Read back every tensor and compare it with the source's, block by block; returns the SHA-256 of each."""
    hashes = {}
    with ThreadPoolExecutor(1) as beside:
        for name in names:
            digest = hashlib.sha256()
            hashing: list[Future[None]] = []
            if written.shape(name) != source.shape(name) or written.dtype(name) != source.dtype(
                name
            ):
                raise CheckpointError(
                    f"{path} does not hold {name} as it was written: the disk is not to be trusted"
                )
            for found, expected in zip(
                row_blocks_of(written, name), row_blocks_of(source, name), strict=True
            ):
                held = raw_bytes(found)
                if not torch.equal(held, raw_bytes(expected)):
                    raise CheckpointError(
                        f"{path} holds {name} with other bytes than were written: the disk or the memory is not to be trusted"
                    )
                for future in hashing:
                    future.result()
                hashing = [beside.submit(digest.update, memoryview(held.numpy()))]
            for future in hashing:
                future.result()
            hashes[name] = digest.hexdigest()
    return hashes


def check_logits(
    source: Source,
    folder: HFFolder,
    config: Any,
    architecture: TransformerConfig,
    *,
    dtype: torch.dtype | None,
    to: str,
) -> VerificationResult:
    """Compare the logits of source and written folder on fixed prompts."""
    tokens = fixed_prompts(architecture)
    by_transformers = to == "hf"
    if by_transformers:
        found = transformers_logits(config, folder, folder.names(), tokens)
    else:
        found = our_logits(architecture, folder, tokens)
    rounded, implementation = source_logits(
        source, architecture, tokens, dtype=dtype, by_transformers=not by_transformers
    )
    largest = float(rounded.abs().max())
    if not rounded.isfinite().all():
        raise CheckpointError(
            f"{source.folder} is no sound model: its own logits are not finite; --no-verify converts it as it is"
        )
    bound = BOUND * max(1.0, largest)
    difference = _difference(found, rounded)
    if not difference <= bound:
        raise CheckpointError(
            f"{source.folder} and what was made of it differ: their logits by {difference:.3g}, and rounding allows {bound:.3g}; "
            "nothing was published. This is a mistake of the converter, not of yours"
        )
    whole = None
    if dtype is not None and any(source.dtype(name) != dtype for name in source.names()):
        exact, _ = source_logits(
            source, architecture, tokens, dtype=None, by_transformers=not by_transformers
        )
        whole = _difference(found, exact)
    return VerificationResult(
        len(source.names()),
        difference,
        bound,
        largest,
        tuple(tokens.shape),
        implementation,
        "transformers" if by_transformers else "our layers",
        whole,
    )


def source_logits(
    source: Source,
    architecture: TransformerConfig,
    tokens: Tensor,
    *,
    dtype: torch.dtype | None,
    by_transformers: bool,
) -> tuple[Tensor, str]:
    """Logits of the source, and by whose code. A source that knows its own way to compute them goes it."""
    if isinstance(source, ComputesItself):
        return source.own_logits(tokens, dtype), source.own_code
    rounded = CastTensors(source, dtype)
    if by_transformers:
        return transformers_logits(source.config, rounded, source.names(), tokens), "transformers"
    return our_logits(architecture, rounded, tokens), "our layers"


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        raise CheckpointError(
            f"source and target give logits of different shapes: {tuple(other.shape)} and {tuple(one.shape)}"
        )
    return float((one - other).abs().max())
