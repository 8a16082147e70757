"""A decoder that tells labels: the last layer of the list with a small matrix of classes in the vocabulary's place.

Which tokens are told a label is said by the labels of the microbatch alone: one token of each text, or the first token of each
word. So a text's classifier and a word's are one layer.

    [S, B, H] -> norm -> whole sequence on every tensor rank -> labelled tokens [n, H] -> scores [n, classes] -> loss
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.data.label_targets import decode_targets
from megatrain.distributed import collectives
from megatrain.distributed.tensor_parallel import linear
from megatrain.models.microbatch import Microbatch
from megatrain.models.norm import hidden_norm
from megatrain.models.params import ParamFactory
from megatrain.ops.random import dropout


class ClassificationHead(nn.Module):
    """Final norm, scores of the labelled tokens, and the sum of their losses (fp32 scalar).

    Every tensor rank holds the whole matrix, sees all labelled tokens and computes the same.
    """

    def __init__(self, parts: ParamFactory) -> None:
        super().__init__()
        a, classifier = parts.architecture, parts.architecture.classifier
        assert classifier is not None
        self.classifier, self.axis, self.sequence = classifier, parts.mesh.tensor, parts.sequence
        self.outcomes: list[tuple[Tensor, Tensor]] | None = None
        """While it is a list, each forward of an evaluation adds its scores and numbers."""
        self.norm = hidden_norm(parts, "final_norm", None)
        self.weight = parts.classifier("weight", (classifier.num_labels, a.hidden_size))
        self.bias = parts.classifier("bias", (classifier.num_labels,)) if classifier.bias else None

    def forward(self, hidden_states: Any, microbatch: Microbatch) -> Tensor:
        scores, numbers = self.scores(hidden_states, microbatch)
        if self.outcomes is not None and not self.training:
            self.outcomes.append((scores.detach(), numbers))
        classifier = self.classifier
        right = decode_targets(
            numbers, problem=classifier.problem, num_labels=classifier.num_labels
        )
        if classifier.problem == "single-label":
            smoothing = classifier.label_smoothing if self.training else 0.0
            return F.cross_entropy(scores, right, reduction="sum", label_smoothing=smoothing)
        if classifier.problem == "multi-label":
            return (
                F.binary_cross_entropy_with_logits(scores, right, reduction="sum")
                / classifier.num_labels
            )
        return F.mse_loss(scores, right, reduction="sum") / classifier.num_labels

    def scores(self, hidden_states: Any, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """Of the labelled tokens, in the order of the microbatch's rows: fp32 [n, classes], and their targets' numbers [n]."""
        hidden = self.norm(hidden_states.hidden)
        if self.sequence:
            hidden = collectives.gather_to_replicated(hidden, self.axis)
        labelled = microbatch.labels >= 0
        rows = hidden.transpose(0, 1)[labelled]
        if self.training and self.classifier.dropout > 0.0:
            rows = dropout(
                rows, self.classifier.dropout, microbatch.mask_key("classifier"), training=True
            )
        return linear(rows, self.weight, self.bias).float(), microbatch.labels[labelled]
