"""Verification of a converted model: the bytes of every tensor, and logits of two implementations.

A Hugging Face folder is computed by transformers, its source by our layers; a megatrain checkpoint
the other way round. A Megatron-LM checkpoint is computed by a decoder that works on Megatron's own
tensors. Names, splits, transposes and the config are thus verified by code that shares nothing with
the conversion. If the conversion lowers the dtype, the source is rounded to it first, so that the
same bound holds; the difference to the exact source is reported as well.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.tensor_io import raw_bytes
from megatrain.conversion.sources import CastTensors, Source, TensorReader, read_row_blocks
from megatrain.conversion.streamed_forward import row_blocks, streamed, with_values
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import ShardSpec, shard_spec
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig
from megatrain.models.microbatch import MicrobatchFactory
from megatrain.models.transformer import build_meta_model

BOUND = 2e-5
"""Largest allowed difference of fp32 logits, relative to the largest logit (at least 1)."""

WEIGHT_BOUND = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Largest relative change of a weight by rounding to nearest, above 6.1e-5 (normal in fp16)."""

NUM_PROMPTS, PROMPT_LENGTH = 2, 24
_OUR_LAYERS = "our layers"


@runtime_checkable
class HasOwnForward(Protocol):
    """A source with a forward pass of its own, on its tensors as they are stored.

    Attributes:
        implementation: a name of that code, for the user to read.
    """

    implementation: str

    def logits(self, tokens: Tensor, dtype: torch.dtype | None) -> Tensor: ...


class VerificationResult(NamedTuple):
    """The result of a verification, as conversion.json stores it.

    Attributes:
        max_logit_difference: between the source, cast to the target's dtype, and the target.
        rounding_difference: between the exact source and the target; None without a cast.
    """

    tensors: int
    max_logit_difference: float
    bound: float
    largest_logit: float
    prompts: tuple[int, ...]
    source_computed_by: str
    target_computed_by: str
    rounding_difference: float | None = None


def compare_bytes(
    written: TensorReader, source: TensorReader, names: list[str], path: Path
) -> dict[str, str]:
    """Compares every written tensor with the source; returns the SHA-256 of each.

    Raises:
        CheckpointError: a tensor differs in shape, dtype or any byte.
    """
    hashes = {}
    with ThreadPoolExecutor(1) as thread:
        for name in names:
            if (written.shape(name), written.dtype(name)) != (
                source.shape(name),
                source.dtype(name),
            ):
                raise CheckpointError(
                    f"{path}: {name} has another shape or dtype than was written; check the disk"
                )
            digest = hashlib.sha256()
            pending: Future[None] | None = None
            blocks = zip(read_row_blocks(written, name), read_row_blocks(source, name), strict=True)
            for found, expected in blocks:
                content = raw_bytes(found)
                if not torch.equal(content, raw_bytes(expected)):
                    raise CheckpointError(
                        f"{path}: {name} has other bytes than were written; "
                        "check the disk and the memory of this machine"
                    )
                if pending is not None:
                    pending.result()
                pending = thread.submit(digest.update, memoryview(content.numpy()))
            if pending is not None:
                pending.result()
            hashes[name] = digest.hexdigest()
    return hashes


def compare_logits(
    source: Source,
    folder: HFFolder,
    config: Any,
    architecture: TransformerConfig,
    *,
    dtype: torch.dtype | None,
    to: str,
) -> VerificationResult:
    """Compares the logits of a source and of the folder and config that were written for it.

    `to` is the format of the folder, "hf" or "checkpoint". Raises CheckpointError if the source's
    logits are not finite, or differ by more than the bound.
    """
    tokens = fixed_prompts(architecture)
    to_hf = to == "hf"
    if to_hf:
        found = transformers_logits(config, folder, folder.names(), tokens)
    else:
        found = our_logits(architecture, folder, tokens)
    expected, implementation = _source_logits(
        source, architecture, tokens, dtype=dtype, by_transformers=not to_hf
    )
    if not expected.isfinite().all():
        raise CheckpointError(
            f"{source.folder}: the model's own logits are not finite; "
            "--no-verify converts it without a comparison"
        )
    largest = float(expected.abs().max())
    bound = BOUND * max(1.0, largest)
    difference = _max_difference(found, expected)
    if not difference <= bound:
        raise CheckpointError(
            f"the logits of {source.folder} and of the converted model differ by {difference:.3g} "
            f"(allowed {bound:.3g}); nothing was published. This is a bug in megatrain; "
            "please report it"
        )
    rounding_difference = None
    if dtype is not None and any(source.dtype(name) != dtype for name in source.names()):
        exact, _ = _source_logits(
            source, architecture, tokens, dtype=None, by_transformers=not to_hf
        )
        rounding_difference = _max_difference(found, exact)
    return VerificationResult(
        tensors=len(source.names()),
        max_logit_difference=difference,
        bound=bound,
        largest_logit=largest,
        prompts=tuple(tokens.shape),
        source_computed_by=implementation,
        target_computed_by="transformers" if to_hf else _OUR_LAYERS,
        rounding_difference=rounding_difference,
    )


def _source_logits(
    source: Source,
    architecture: TransformerConfig,
    tokens: Tensor,
    *,
    dtype: torch.dtype | None,
    by_transformers: bool,
) -> tuple[Tensor, str]:
    """Returns logits [B, S, V] of the source cast to `dtype`, and the code that computed them."""
    if isinstance(source, HasOwnForward):
        return source.logits(tokens, dtype), source.implementation
    tensors = CastTensors(source, dtype)
    if by_transformers:
        return transformers_logits(source.config, tensors, source.names(), tokens), "transformers"
    return our_logits(architecture, tensors, tokens), _OUR_LAYERS


def _max_difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        raise CheckpointError(
            f"source and target have logits of different shapes: {tuple(other.shape)} and "
            f"{tuple(one.shape)}"
        )
    return float((one - other).abs().max())


def fixed_prompts(architecture: TransformerConfig) -> Tensor:
    """Returns tokens int64 [B, S], the same for all models of this vocabulary size."""
    generator = torch.Generator().manual_seed(20)
    length = min(PROMPT_LENGTH, architecture.max_positions)
    return torch.randint(0, architecture.vocab_size, (NUM_PROMPTS, length), generator=generator)


@torch.no_grad()
def our_logits(architecture: TransformerConfig, tensors: TensorReader, tokens: Tensor) -> Tensor:
    """Returns logits [B, S, V] of our layers in fp32, which hold one matrix at a time."""
    layers = build_meta_model(architecture).eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    factory = MicrobatchFactory(
        architecture,
        make_mesh(0, connect=False),
        torch.device("cpu"),
        dtype=torch.float32,
        separate_documents=False,
        seed=0,
    )
    batch = Batch(tokens, tokens, positions, torch.zeros_like(tokens))
    microbatch = factory.make(batch, step=None, index=0)

    def read(parameter: nn.Parameter, rows: slice | None) -> Tensor:
        return read_parameter(tensors, shard_spec(parameter), rows).float()

    with streamed(layers, read):
        hidden_states = None
        for layer in layers[:-1]:
            hidden_states = layer(hidden_states, microbatch)
        head: Any = layers[-1]
        blocks = []
        for rows in row_blocks(head.weight):
            with with_values(head, "weight", read(head.weight, rows)):
                blocks.append(head.logits(hidden_states))
    return torch.cat(blocks, dim=-1).transpose(0, 1)


def read_parameter(tensors: TensorReader, spec: ShardSpec, rows: slice | None = None) -> Tensor:
    """Returns the values of a parameter of our layers, or some of its rows."""
    slices = spec.slices()
    if rows is not None and len(slices) == 1 and not spec.transposed:
        first, *others = slices[0].full
        stored_rows = slice(first.start + rows.start, first.start + rows.stop)
        return tensors.read(spec.name, (stored_rows, *others))
    part = torch.empty(spec.shard_shape(), dtype=tensors.dtype(spec.name))
    for piece in slices:
        part[piece.shard] = tensors.read(spec.name, piece.full)
    values = part.t() if spec.transposed else part
    return values if rows is None else values[rows]


@torch.no_grad()
def transformers_logits(
    config: Any, tensors: TensorReader, names: list[str], tokens: Tensor
) -> Tensor:
    """Returns logits [B, S, V] of transformers' model in fp32, which holds one matrix at a time."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
        ).eval()
    model.tie_weights()  # the meta device unties them
    known = set(names)
    name_map = {
        id(parameter): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in known
    }
    missing = [
        name for name, parameter in model.named_parameters() if id(parameter) not in name_map
    ]
    if missing:
        raise AssertionError(
            f"transformers' {type(model).__name__} requires {missing[0]}, which was not converted"
        )

    def read(parameter: nn.Parameter, rows: slice | None) -> Tensor:
        return tensors.read(name_map[id(parameter)], None if rows is None else (rows,)).float()

    with streamed(model, read):
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits
