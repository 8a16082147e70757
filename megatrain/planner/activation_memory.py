"""What a layer holds of one microbatch, found by running it without memory (torch's meta device).

Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) count what a transformer layer keeps for its backward by hand: sbh(34 + 5as/h)
bytes in half precision. Here the very layers of the run are run, forward and backward, and the storages that live are counted (live.py):
what autograd keeps of them, and the most that they take while they work. So what a layer of ours keeps, or recomputes, needs no
formula of its own.

One op is no op of ours, and keeps what its kernel keeps: fused attention, which has queries, keys, values, its result and one fp32
number a token and head. `is_fused` says where torch has such a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.distributed import collectives
from megatrain.distributed.tensor_parallel import (
    DeferredWeightGrad,
    compute_deferred_weight_grads,
    defer_weight_grads,
    linear,
)
from megatrain.models.attention import Attention
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.microbatch import Microbatch
from megatrain.models.transformer import Embedding, HiddenStates
from megatrain.planner.tensor_tracker import TensorTracker


class ActivationFootprint(NamedTuple):
    """Bytes of a layer for one microbatch, or of a chunk of layers.

    Attributes:
        kept: from its forward until its backward is done.
        forward: the most that it takes in its forward, `kept` included.
        backward: the most that a whole backward takes beside what is kept.
        deferred: kept for W, between the two parts of a backward; its result is counted in `backward`.
        input_backward: the most that I takes beside what is kept, and what it defers included.
        weight_backward: the most that W takes beside what is deferred.
        left: gradients of weights that are put away only once the backward of all layers is done.
    """

    kept: int = 0
    forward: int = 0
    backward: int = 0
    deferred: int = 0
    input_backward: int = 0
    weight_backward: int = 0
    left: int = 0


def layer_chain(layers: list[ActivationFootprint]) -> ActivationFootprint:
    """Of layers one after the other: backwards go from the last to the first, each with all before it still kept."""
    kept = forward = 0
    for layer in layers:
        forward = max(forward, kept + layer.forward)
        kept += layer.kept
    backward = input_backward = left = deferred = 0
    held = kept
    for layer in reversed(layers):
        backward = max(backward, held - kept + left + layer.backward)
        input_backward = max(input_backward, held - kept + left + deferred + layer.input_backward)
        held -= layer.kept
        left += layer.left
        deferred += layer.deferred
    return ActivationFootprint(
        kept,
        forward,
        backward,
        deferred,
        input_backward,
        max((layer.weight_backward for layer in layers), default=0),
        left,
    )


def layer_signature(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers of equal footprint: layers differ in their parameters, and in what they attend to."""
    kinds = [
        (module.window, module.rope_kind)
        for module in layer.modules()
        if isinstance(module, Attention)
    ]
    return (
        type(layer),
        tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in layer.parameters()),
        tuple(kinds),
    )


def measure(
    layer: nn.Module,
    microbatch: Microbatch,
    *,
    hidden_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    split: bool,
) -> ActivationFootprint:
    """The footprint of a layer on the meta device, as it would be on `device` (cuda or cpu).

    `split` when the run's schedule has backwards in two parts; else what those take is left out.
    """
    layer.train()
    kept, forward, backward, left = _run(
        layer, microbatch, hidden_shape, dtype, device, deferred=None
    )
    if not split:
        return ActivationFootprint(kept, forward, backward, left=left)
    waiting: list[DeferredWeightGrad] = []
    _, _, input_backward, deferred = _run(
        layer, microbatch, hidden_shape, dtype, device, deferred=waiting
    )
    with TensorTracker() as live:
        compute_deferred_weight_grads(waiting)
    return ActivationFootprint(
        kept, forward, backward, deferred - left, input_backward, live.peak, left
    )


def _run(
    layer: nn.Module,
    microbatch: Microbatch,
    hidden_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    deferred: list[DeferredWeightGrad] | None,
) -> tuple[int, int, int, int]:
    """A forward and a backward: bytes kept, the most in the forward, the most in the backward beside what is kept, and left at the end."""
    parameters = list(layer.parameters())
    entered = (
        None
        if isinstance(layer, Embedding)
        else torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
    )
    there = [*parameters, *_tensors(microbatch), *([] if entered is None else [entered])]
    with ExitStack() as stack:
        live = stack.enter_context(TensorTracker(there))
        stack.enter_context(_attending(device))
        output = _forward(layer, None if entered is None else HiddenStates(entered), microbatch)
        kept, forward = live.bytes, live.peak
        live.reset_peak()
        gradient = torch.empty_like(output)
        if output.requires_grad:
            if deferred is not None:
                stack.enter_context(defer_weight_grads(deferred))
            torch.autograd.backward(output, gradient)
        backward = live.peak - kept
        del output, gradient
        if entered is not None:
            entered.grad = None
        left = live.bytes
    for parameter in parameters:
        parameter.grad = None
    return kept, forward, backward, left


def _forward(
    layer: nn.Module, hidden_states: HiddenStates | None, microbatch: Microbatch
) -> Tensor:
    if isinstance(layer, ClassificationHead):
        assert hidden_states is not None
        return _classify(layer, hidden_states, microbatch)
    result = layer(hidden_states, microbatch)
    return result if isinstance(result, Tensor) else result.hidden


def _classify(
    head: ClassificationHead, hidden_states: HiddenStates, microbatch: Microbatch
) -> Tensor:
    """A classifier's loss with as many labelled tokens as there can be: without memory there are no labels to count."""
    hidden = head.norm(hidden_states.hidden)
    if head.sequence:
        hidden = collectives.gather_to_replicated(hidden, head.axis)
    rows = hidden.transpose(0, 1).flatten(0, 1)[
        : microbatch.labels.numel() if head.classifier.of_tokens else microbatch.labels.shape[0]
    ]
    return linear(rows.clone(), head.weight, head.bias).float().log_softmax(-1).sum()


def _tensors(microbatch: Microbatch) -> list[Tensor]:
    """All that a context holds."""
    fields = [
        microbatch.tokens,
        microbatch.labels,
        microbatch.positions,
        microbatch.documents,
        *microbatch.masks.values(),
    ]
    return [
        tensor
        for tensor in [*fields, *(part for turn in microbatch.rotations.values() for part in turn)]
        if tensor is not None
    ]


# -- fused attention ---------------------------------------------------------------------------------------------------


def is_fused(
    device: str, *, dtype: torch.dtype, head_dim: int, masked: bool, grouped: bool
) -> bool:
    """Whether torch's scaled_dot_product_attention keeps no scores: on CPUs always (torch 2.13, seen in its graph).

    On GPUs by the conditions in torch's aten/native/transformers/cuda/sdp_utils.cpp: flash attention takes half precision, heads up
    to 256 and no mask; the memory-efficient kernel takes masks and fp32, but no grouped heads. What neither takes is written out.
    """
    if device == "cpu":
        return True
    flash = not masked and dtype != torch.float32 and head_dim <= 256
    return flash or not grouped


@contextmanager
def _attending(device: str) -> Iterator[None]:
    """Within it attention keeps what a fused kernel of the device would, where there is one; on the meta device torch writes it out."""
    written_out = F.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        grouped = bool(more.get("enable_gqa"))
        if is_fused(
            device,
            dtype=query.dtype,
            head_dim=query.shape[-1],
            masked=attn_mask is not None,
            grouped=grouped,
        ):
            return _Fused.apply(query, key, value, attn_mask)
        return written_out(query, key, value, attn_mask=attn_mask, **more)

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = written_out


class _Fused(torch.autograd.Function):
    """q [B, h, S, d], k and v [B, g, S, d] -> [B, h, S, d]; a mask of truths is made numbers, and kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result, sums = (
            torch.empty_like(query),
            query.new_empty(query.shape[:-1], dtype=torch.float32),
        )
        numbers = None if mask is None else torch.empty_like(mask, dtype=query.dtype)
        ctx.save_for_backward(query, key, value, result, sums, numbers)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
