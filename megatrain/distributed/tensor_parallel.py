"""Layers whose weights are split over tensor ranks.

Columns of a weight are its output features, rows its input features (Megatron-LM, arXiv 1909.08053, section 3):

    [S, B, H] -- enter --> Linear by columns -> [S, B, F/t] -> Linear by rows -> partial sums -- leave --> [S, B, H]

A `Linear` knows nothing of ranks; `enter` and `leave` of `collectives` stand around a pair, so that several linears
that read the same input (query, key, value; gate, up) share one communication.

Shapes: S sequence, B micro-batch, H hidden, F features, V vocabulary, t tensor ranks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis
from megatrain.ops.compile import compiled
from megatrain.ops.nf4 import NF4Weight, dequantize
from megatrain.ops.row_blocks import row_blocks


@functools.cache
def lacks_native_bf16(device_type: str) -> bool:
    """Whether matrix products of bf16 are faster through fp32: on CPUs without bf16 units they are 5 to 100 times slower."""
    if device_type != "cpu":
        return False
    return not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def to_matmul_dtype(x: Tensor) -> Tensor:
    """x in the dtype in which its device multiplies matrices well; results are rounded back to x's dtype by the caller."""
    return x.float() if x.dtype != torch.float32 and lacks_native_bf16(x.device.type) else x


class _Linear(torch.autograd.Function):
    """x [..., in] times weight [out, in], its weight gradient added straight into the fp32 `main_grad` where there is one.

    Adding in place spares a temporary of the weight's size for each microbatch, and accumulates in fp32 whatever the
    weight's dtype. For a frozen weight the input is not kept; a quantized one is made a matrix for as long as it is multiplied.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        y = F.linear(
            to_matmul_dtype(x),
            to_matmul_dtype(dequantize(weight, x.dtype)),
            None if bias is None else to_matmul_dtype(bias),
        )
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        wide = to_matmul_dtype(grad.reshape(-1, grad.shape[-1]))
        dx = (
            (wide @ to_matmul_dtype(dequantize(weight, grad.dtype)))
            .to(grad.dtype)
            .view(*grad.shape[:-1], weight.shape[1])
            if ctx.needs_input_grad[0]
            else None
        )
        dw = (
            _weight_gradient(DeferredWeightGrad(weight, x, grad))
            if ctx.needs_input_grad[1]
            else None
        )
        db = wide.sum(0).to(grad.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, dw, db


class DeferredWeightGrad(NamedTuple):
    """What a weight's gradient is computed from: the linear's input and its output's gradient."""

    weight: Tensor
    x: Tensor
    grad: Tensor


_deferred: list[DeferredWeightGrad] | None = None


@contextlib.contextmanager
def defer_weight_grads(into: list[DeferredWeightGrad]) -> Iterator[None]:
    """Within it a backward leaves the gradients of linear weights for later, in the list.

    Of the whole process, not of a thread: autograd runs a GPU's backward on a thread of its own.
    """
    global _deferred
    _deferred = into
    try:
        yield
    finally:
        _deferred = None


@torch.no_grad()
def compute_deferred_weight_grads(deferred: list[DeferredWeightGrad]) -> None:
    """Add each weight's gradient to its main_grad; what it was computed from is let go at once."""
    while deferred:
        weight_gradient(*deferred.pop())


def _weight_gradient(sources: DeferredWeightGrad) -> Tensor | None:
    """Now, or later where a backward is split and the weight has a buffer to add to."""
    if _deferred is not None and hasattr(sources.weight, "main_grad"):
        _deferred.append(sources)
        return None
    return weight_gradient(*sources)


def weight_gradient(weight: Tensor, x: Tensor, grad: Tensor) -> Tensor | None:
    """Add grad' x [out, in] into weight.main_grad and return None, or return it where the weight has no such buffer."""
    x, grad = (
        to_matmul_dtype(x.reshape(-1, x.shape[-1])),
        to_matmul_dtype(grad.reshape(-1, grad.shape[-1])),
    )
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return (grad.t() @ x).to(weight.dtype)
    if x.dtype == main_grad.dtype:
        main_grad.addmm_(grad.t(), x)
    else:
        gradient = grad.t() @ x
        for part in row_blocks(gradient):
            main_grad[part].add_(gradient[part])
    return None


def linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(x, weight, bias)


class ColumnParallelLinear(nn.Module):
    """x [..., in] -> [..., out]; the parameters say themselves how they are split."""

    weight: nn.Parameter | NF4Weight

    def __init__(self, weight: nn.Parameter | NF4Weight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor, microbatch: Any = None) -> Tensor:
        """`context`, the microbatch's, is for what may stand in a linear's place."""
        return linear(x, self.weight, self.bias)


class RowParallelLinear(ColumnParallelLinear):
    """A linear split by rows: the sum over tensor ranks is taken before the bias, which all of them hold."""

    def __init__(
        self,
        weight: nn.Parameter | NF4Weight,
        bias: nn.Parameter | None,
        *,
        axis: MeshAxis,
        sequence: bool,
    ) -> None:
        super().__init__(weight, bias)
        self.axis, self.sequence = axis, sequence

    def forward(self, x: Tensor, microbatch: Any = None) -> Tensor:
        y = collectives.leave_tensor_parallel(
            linear(x, self.weight), self.axis, sequence=self.sequence
        )
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Rows of a table split over tensor ranks: tokens int64 [B, S] -> [S, B, H], or [S/t, B, H] under sequence parallelism."""

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        start: int,
        axis: MeshAxis,
        sequence: bool,
        padding_token: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.start, self.axis, self.sequence = start, axis, sequence
        here = padding_token is not None and start <= padding_token < start + weight.shape[0]
        self.padding_row = padding_token - start if padding_token is not None and here else None

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens.t() - self.start
        if self.axis.size == 1:
            return F.embedding(local, self.weight, self.padding_row)
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight, self.padding_row)
        return collectives.leave_tensor_parallel(
            rows.masked_fill(elsewhere[..., None], 0), self.axis, sequence=self.sequence
        )


class _VocabCrossEntropy(torch.autograd.Function):
    """Cross-entropy over a vocabulary split among tensor ranks (Megatron-LM section 3), in place on the logits.

    The logits' memory becomes the gradient's, a slab of rows at a time in fp32, so that no second [tokens, vocabulary]
    tensor is ever held.
    """

    SLAB = 512

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        start: int,
        vocab_size: int,
        axis: MeshAxis,
        compile: bool,
    ) -> Tensor:
        real = max(0, min(logits.shape[1], vocab_size - start))
        logits = logits.detach()
        ctx.save_for_backward(logits)
        if compile and axis.size == 1:
            return _cross_entropy_compiled(logits, labels, real)
        losses = [
            _cross_entropy_slab(
                logits[i : i + _VocabCrossEntropy.SLAB],
                labels[i : i + _VocabCrossEntropy.SLAB],
                start,
                real,
                axis,
            )
            for i in range(0, logits.shape[0], _VocabCrossEntropy.SLAB)
        ]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (dlogits,) = ctx.saved_tensors
        return dlogits.mul_(grad[:, None].to(dlogits.dtype)), None, None, None, None, None


def _cross_entropy_slab(
    logits: Tensor, labels: Tensor, start: int, real: int, axis: MeshAxis
) -> Tensor:
    """Losses [n] of logits [n, V/t]; afterwards logits hold the loss's gradient, rows of label -100 zeros."""
    x = logits.float()
    x[:, real:] = float("-inf")
    top = x.amax(1) if real else x.new_full((x.shape[0],), float("-inf"))
    top = collectives.all_reduce(top, axis, op=dist.ReduceOp.MAX)
    local = labels - start
    here = (local >= 0) & (local < real)
    index = local.masked_fill(~here, 0)[:, None]
    x.sub_(top[:, None])
    target = x.gather(1, index).squeeze(1).masked_fill(~here, 0.0)
    x.exp_()
    total = x.sum(1)
    both = collectives.all_reduce(torch.stack([total, target]), axis)
    total, target = both[0], both[1]
    trained = labels >= 0
    x.div_(total[:, None])
    x.scatter_add_(1, index, -here.to(x.dtype)[:, None])
    x.mul_(trained.to(x.dtype)[:, None])
    if x.data_ptr() != logits.data_ptr():
        logits.copy_(x)
    return torch.where(trained, total.log() - target, total.new_zeros(()))


def _cross_entropy_compiled(logits: Tensor, labels: Tensor, real: int) -> Tensor:
    """The same of a whole vocabulary, of which the first `real` are tokens; a kernel that holds nothing between."""
    rows, columns = torch.arange(logits.shape[0], device=logits.device), labels.clamp(min=0)
    losses, at_labels = compiled(_cross_entropy)(
        logits[:, :real], logits[rows, columns][:, None], labels
    )
    logits[:, real:] = 0
    logits[rows, columns] = at_labels.squeeze(1)  # scatter_ would copy all logits twice
    return losses


def _cross_entropy(logits: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [n], and the gradient at each label [n, 1], from its logit; afterwards logits hold the gradient at all others.

    The logits are read in whole rows only, and so are written where they lie.
    """
    x, trained = logits.float(), (labels >= 0)[:, None]
    top = x.amax(1, keepdim=True)
    total = (x - top).exp().sum(1, keepdim=True)
    scale = trained / total
    logits.copy_((x - top).exp() * scale)
    above = target.float() - top
    losses = torch.where(trained, total.log() - above, 0.0)
    return losses.squeeze(1), (above.exp() * scale - trained.float()).to(logits.dtype)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    start: int,
    vocab_size: int,
    axis: MeshAxis,
    compile: bool = False,
) -> Tensor:
    """Loss of each token, fp32 [n], from this rank's logits [n, V/t], whose memory it takes over.

    Args:
        labels: int64 [n]; -100 marks tokens without a loss.
        start: the vocabulary id of the first column here; columns from `vocab_size` on are padding.
    """
    return _VocabCrossEntropy.apply(logits, labels, start, vocab_size, axis, compile)
