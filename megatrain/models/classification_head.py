"""A classification head: the last layer of a decoder that predicts classes or values instead of
tokens.

The labels of the microbatch mark the tokens that it classifies: one token of each text, or the
first token of each word. So classifiers of texts and of words share one layer.

    [S, B, H] -> norm -> full sequence on every tensor rank -> labelled tokens [n, H]
    -> scores [n, classes] -> loss

Shapes: S sequence, B micro-batch, H hidden, n labelled tokens of the microbatch.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.distributed import collectives
from megatrain.distributed.tensor_parallel import linear
from megatrain.models.microbatch import Microbatch
from megatrain.models.norm import hidden_norm
from megatrain.models.params import ParamFactory
from megatrain.ops.random import dropout


class ClassificationHead(nn.Module):
    """Final norm, scores of the labelled tokens, and the sum of their losses (fp32 scalar).

    Every tensor rank holds the full matrix and computes the same for all labelled tokens.

    Attributes:
        outcomes: None, or a list to which each forward in evaluation appends scores and targets.
    """

    def __init__(self, params: ParamFactory) -> None:
        super().__init__()
        a, config = params.architecture, params.architecture.classifier
        assert config is not None
        self.config, self.axis, self.sequence = config, params.mesh.tensor, params.sequence
        self.outcomes: list[tuple[Tensor, Tensor]] | None = None
        self.norm = hidden_norm(params, "final_norm", None)
        self.weight = params.classifier("weight", (config.num_labels, a.hidden_size))
        self.bias = params.classifier("bias", (config.num_labels,)) if config.bias else None

    def forward(self, hidden_states: Any, microbatch: Microbatch) -> Tensor:
        """Returns the sum of the labelled tokens' losses, as transformers defines them."""
        scores, targets = self.scores(hidden_states, microbatch), self.targets(microbatch)
        if self.outcomes is not None and not self.training:
            self.outcomes.append((scores.detach(), targets))
        config = self.config
        if config.problem == "single-label":
            smoothing = config.label_smoothing if self.training else 0.0
            return F.cross_entropy(scores, targets, reduction="sum", label_smoothing=smoothing)
        if config.problem == "multi-label":
            loss = F.binary_cross_entropy_with_logits(scores, targets, reduction="sum")
        else:
            loss = F.mse_loss(scores, targets, reduction="sum")
        return loss / config.num_labels

    def scores(self, hidden_states: Any, microbatch: Microbatch) -> Tensor:
        """Returns the scores of the labelled tokens, fp32 [n, classes], in the order of the
        rows."""
        hidden = self.norm(hidden_states.hidden)
        if self.sequence:
            hidden = collectives.gather_to_replicated(hidden, self.axis)
        rows = hidden.transpose(0, 1)[microbatch.labels >= 0]
        if self.training and self.config.dropout > 0.0:
            rows = dropout(
                rows, self.config.dropout, microbatch.mask_key("classifier"), training=True
            )
        return linear(rows, self.weight, self.bias).float()

    def targets(self, microbatch: Microbatch) -> Tensor:
        """Returns the targets of the labelled tokens: classes int64 [n], or values fp32 [n,
        labels]."""
        labelled = microbatch.labels >= 0
        if microbatch.targets is None:
            return microbatch.labels[labelled]
        return microbatch.targets[labelled.any(1)]
