"""Cross-entropy over a vocabulary sharded among tensor ranks (Megatron-LM, arXiv 1909.08053,
section 3).

The gradient overwrites the logits, one block of rows at a time in fp32. So no second tensor of
[tokens, vocabulary] exists.

Shapes: n tokens, V vocabulary with padding, t tensor ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis
from megatrain.ops.compile import compiled

ROWS = 512
"""Rows of logits that are processed at once."""


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    start: int,
    vocab_size: int,
    axis: MeshAxis,
    compile: bool = False,
) -> Tensor:
    """Returns the loss of each token, fp32 [n], from this rank's logits [n, V/t], which it
    overwrites.

    Args:
        labels: int64 [n]; -100 marks tokens without a loss.
        start: the vocabulary id of this rank's first column; columns from `vocab_size` on are
            padding.
        compile: use compiled kernels, on an axis of size 1.
    """
    return _VocabCrossEntropy.apply(logits, labels, start, vocab_size, axis, compile)


class _VocabCrossEntropy(torch.autograd.Function):
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
        columns = max(0, min(logits.shape[1], vocab_size - start))
        logits = logits.detach()
        ctx.save_for_backward(logits)
        if compile and axis.size == 1:
            return _compiled_cross_entropy(logits, labels, columns)
        losses = [
            _block_cross_entropy(logits[i : i + ROWS], labels[i : i + ROWS], start, columns, axis)
            for i in range(0, logits.shape[0], ROWS)
        ]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (dlogits,) = ctx.saved_tensors
        return dlogits.mul_(grad[:, None].to(dlogits.dtype)), None, None, None, None, None


def _block_cross_entropy(
    logits: Tensor, labels: Tensor, start: int, columns: int, axis: MeshAxis
) -> Tensor:
    """Returns losses [n] and overwrites logits [n, V/t] with the gradient, zero for label -100."""
    x = logits.float()
    x[:, columns:] = float("-inf")
    top = x.amax(1) if columns else x.new_full((x.shape[0],), float("-inf"))
    top = collectives.all_reduce(top, axis, op=dist.ReduceOp.MAX)
    local = labels - start
    is_local = (local >= 0) & (local < columns)
    index = local.masked_fill(~is_local, 0)[:, None]
    x.sub_(top[:, None])
    target = x.gather(1, index).squeeze(1).masked_fill(~is_local, 0.0)
    x.exp_()
    total = x.sum(1)
    both = collectives.all_reduce(torch.stack([total, target]), axis)
    total, target = both[0], both[1]
    has_loss = labels >= 0
    x.div_(total[:, None])
    x.scatter_add_(1, index, -is_local.to(x.dtype)[:, None])
    x.mul_(has_loss.to(x.dtype)[:, None])
    if x.data_ptr() != logits.data_ptr():
        logits.copy_(x)
    return torch.where(has_loss, total.log() - target, total.new_zeros(()))


def _compiled_cross_entropy(logits: Tensor, labels: Tensor, columns: int) -> Tensor:
    """Does the same for an unsharded vocabulary, whose first `columns` columns are tokens."""
    rows, targets = torch.arange(logits.shape[0], device=logits.device), labels.clamp(min=0)
    losses, at_labels = compiled(_cross_entropy)(
        logits[:, :columns], logits[rows, targets][:, None], labels
    )
    logits[:, columns:] = 0
    logits[rows, targets] = at_labels.squeeze(1)  # scatter_ would copy all logits twice
    return losses


def _cross_entropy(logits: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns losses [n] and the gradient at each label [n, 1], from the label's logit `target`.

    The gradient at all other columns overwrites the logits. They are read in complete rows only,
    which allows the kernel to write in place.
    """
    x, has_loss = logits.float(), (labels >= 0)[:, None]
    top = x.amax(1, keepdim=True)
    total = (x - top).exp().sum(1, keepdim=True)
    scale = has_loss / total
    logits.copy_((x - top).exp() * scale)
    above = target.float() - top
    losses = torch.where(has_loss, total.log() - above, 0.0)
    return losses.squeeze(1), (above.exp() * scale - has_loss.float()).to(logits.dtype)
