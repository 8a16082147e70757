"""Measures the activation memory of a layer by running it on torch's meta device.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) derive what a transformer layer keeps for
its backward: sbh(34 + 5as/h) bytes in half precision. Here the run's own layers run forward and
backward, and live storages are counted (tensor_tracker.py): the tensors that autograd keeps, and
the peak. Recomputation, adapters and other layers therefore need no formula.

Fused attention is modelled explicitly, because its saved tensors depend on the kernel: queries,
keys, values, output, and one fp32 number per token and head. `is_fused` lists where torch has such
a kernel.
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
from megatrain.ops import dtypes
from megatrain.planner.tensor_tracker import TensorTracker


class ActivationFootprint(NamedTuple):
    """Bytes of a layer, or of a chain of layers, for one microbatch.

    Schedules with split backwards compute gradients of inputs (I) and of weights (W) apart.

    Attributes:
        kept: from the forward until the backward is done.
        forward: peak of the forward, with `kept`.
        backward: peak of a full backward, without `kept`.
        deferred: kept between I and W; its result is part of `backward`.
        input_backward: peak of I, without `kept` and with `deferred`.
        weight_backward: peak of W, without `deferred`.
        left: weight gradients that are freed once the backward of all layers is done.
    """

    kept: int = 0
    forward: int = 0
    backward: int = 0
    deferred: int = 0
    input_backward: int = 0
    weight_backward: int = 0
    left: int = 0


class _Run(NamedTuple):
    """Bytes of a forward and a backward: kept, both peaks, and left at the end."""

    kept: int
    forward: int
    backward: int
    left: int


def layer_chain(layers: list[ActivationFootprint]) -> ActivationFootprint:
    """Returns the footprint of layers in sequence.

    In the backward of a layer, all layers before it still keep their activations.
    """
    kept = forward = 0
    for layer in layers:
        forward = max(forward, kept + layer.forward)
        kept += layer.kept
    backward = input_backward = left = deferred = 0
    remaining = kept
    for layer in reversed(layers):
        base = remaining - kept + left
        backward = max(backward, base + layer.backward)
        input_backward = max(input_backward, base + deferred + layer.input_backward)
        remaining -= layer.kept
        left += layer.left
        deferred += layer.deferred
    weight_backward = max((layer.weight_backward for layer in layers), default=0)
    return ActivationFootprint(
        kept, forward, backward, deferred, input_backward, weight_backward, left
    )


def layer_signature(layer: nn.Module) -> tuple[Any, ...]:
    """Returns a key that is equal for layers of equal footprint: parameters and attention masks."""
    attention = [
        (module.window, module.rope_kind)
        for module in layer.modules()
        if isinstance(module, Attention)
    ]
    return (
        type(layer),
        tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in layer.parameters()),
        tuple(attention),
    )


def measure(
    layer: nn.Module,
    microbatch: Microbatch,
    *,
    hidden_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    splits_backward: bool,
) -> ActivationFootprint:
    """Returns the footprint that a layer on the meta device would have on `device`.

    Args:
        device: `cuda` or `cpu`.
        splits_backward: whether to measure I and W, which only some schedules have.
    """
    layer.train()
    full = _run(layer, microbatch, hidden_shape, dtype, device, deferred=None)
    if not splits_backward:
        return ActivationFootprint(full.kept, full.forward, full.backward, left=full.left)
    weight_grads: list[DeferredWeightGrad] = []
    split = _run(layer, microbatch, hidden_shape, dtype, device, deferred=weight_grads)
    with TensorTracker() as tracker:
        compute_deferred_weight_grads(weight_grads)
    return ActivationFootprint(
        full.kept,
        full.forward,
        full.backward,
        deferred=split.left - full.left,
        input_backward=split.backward,
        weight_backward=tracker.peak,
        left=full.left,
    )


def _run(
    layer: nn.Module,
    microbatch: Microbatch,
    hidden_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    deferred: list[DeferredWeightGrad] | None,
) -> _Run:
    """Runs forward and backward; the backward is I if `deferred` collects weight gradients."""
    parameters = list(layer.parameters())
    hidden = None
    if not isinstance(layer, Embedding):
        hidden = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
    inputs = [*parameters, *_tensors(microbatch), *([] if hidden is None else [hidden])]
    with ExitStack() as stack:
        tracker = stack.enter_context(TensorTracker(inputs))
        stack.enter_context(_fused_attention(device))
        stack.enter_context(_matmul_dtype(device))
        output = _forward(layer, None if hidden is None else HiddenStates(hidden), microbatch)
        kept, forward = tracker.bytes, tracker.peak
        tracker.reset_peak()
        gradient = torch.empty_like(output)
        if output.requires_grad:
            if deferred is not None:
                stack.enter_context(defer_weight_grads(deferred))
            torch.autograd.backward(output, gradient)
        backward = tracker.peak - kept
        del output, gradient
        if hidden is not None:
            hidden.grad = None
        left = tracker.bytes
    for parameter in parameters:
        parameter.grad = None
    return _Run(kept, forward, backward, left)


def _forward(
    layer: nn.Module, hidden_states: HiddenStates | None, microbatch: Microbatch
) -> Tensor:
    if isinstance(layer, ClassificationHead):
        assert hidden_states is not None
        return _classification_loss(layer, hidden_states, microbatch)
    result = layer(hidden_states, microbatch)
    return result if isinstance(result, Tensor) else result.hidden


def _classification_loss(
    head: ClassificationHead, hidden_states: HiddenStates, microbatch: Microbatch
) -> Tensor:
    """Computes the loss for the largest possible number of labels: meta tensors have no values."""
    hidden = head.norm(hidden_states.hidden)
    if head.sequence:
        hidden = collectives.gather_to_replicated(hidden, head.axis)
    labels = microbatch.labels
    num_labels = labels.numel() if head.config.of_tokens else labels.shape[0]
    rows = hidden.transpose(0, 1).flatten(0, 1)[:num_labels]
    return linear(rows.clone(), head.weight, head.bias).float().log_softmax(-1).sum()


def _tensors(microbatch: Microbatch) -> list[Tensor]:
    """Returns all tensors of a microbatch."""
    fields = [
        microbatch.tokens,
        microbatch.labels,
        microbatch.positions,
        microbatch.documents,
        *microbatch.masks.values(),
        *(tensor for rotation in microbatch.rotations.values() for tensor in rotation),
    ]
    return [tensor for tensor in fields if tensor is not None]


# -- fused attention -------------------------------------------------------------------------------


def is_fused(
    device: str, *, dtype: torch.dtype, head_dim: int, masked: bool, grouped: bool
) -> bool:
    """Returns True if torch's scaled_dot_product_attention keeps no scores.

    On CPUs it never keeps them (seen in the autograd graph of torch 2.13). On GPUs it depends on
    torch's aten/native/transformers/cuda/sdp_utils.cpp. Flash attention takes half precision, heads
    up to 256 and no mask. The memory-efficient kernel takes masks and fp32, but no
    grouped heads. Everything else is computed unfused.
    """
    if device == "cpu":
        return True
    flash = not masked and dtype != torch.float32 and head_dim <= 256
    return flash or not grouped


@contextmanager
def _fused_attention(device: str) -> Iterator[None]:
    """Makes attention keep what the device's fused kernel keeps; the meta device has none."""
    unfused = F.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        if is_fused(
            device,
            dtype=query.dtype,
            head_dim=query.shape[-1],
            masked=attn_mask is not None,
            grouped=bool(options.get("enable_gqa")),
        ):
            return _FusedAttention.apply(query, key, value, attn_mask)
        return unfused(query, key, value, attn_mask=attn_mask, **options)

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = unfused


@contextmanager
def _matmul_dtype(device: str) -> Iterator[None]:
    """Converts inputs of matrix products to fp32 if the CPUs of this machine lack bf16 units."""
    by_device = dtypes.lacks_native_bf16
    lacks_units = by_device(device)
    dtypes.lacks_native_bf16 = lambda _: lacks_units  # type: ignore[assignment]
    try:
        yield
    finally:
        dtypes.lacks_native_bf16 = by_device


class _FusedAttention(torch.autograd.Function):
    """Stands for a fused kernel: q [B, h, S, d], k and v [B, g, S, d] -> [B, h, S, d].

    A boolean mask is converted to numbers and kept.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        bias = None if mask is None else torch.empty_like(mask, dtype=query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sums, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
