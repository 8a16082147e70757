"""Objectives: the sum of the tokens' losses, or a loss over pairs of a chosen and a rejected
answer.

    a microbatch of B sequences, never split:   chosen 0 | rejected 0 | chosen 1 | rejected 1 | ...

log p is the sum of an answer's log-probabilities, mean p their mean, log r the sum under the
reference model. d(x) is the difference of x between the chosen and the rejected answer:

    dpo      -log sigmoid(beta d(log p - log r))
    simpo    -log sigmoid(beta d(mean p) - margin)
    orpo     -mean p of the chosen - beta log sigmoid(d(log odds of mean p))

Sources: DPO, arXiv 2305.18290, equation 7; SimPO, arXiv 2405.14734, equation 6; ORPO, arXiv
2403.07691, equations 4 to 7.

`label_smoothing` mixes in the loss of the swapped pair, for labels that may be wrong (cDPO). A
pair's reward is the term inside the sigmoid: beta (log p - log r), or beta mean p.

Shapes: S sequence, B micro-batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.config.schema import PreferenceConfig
from megatrain.models.microbatch import Microbatch


class Objective(Protocol):
    """The scalar that the head returns: a sum over tokens or pairs.

    Attributes:
        measures: names of the values that it stores in `Microbatch.measured`, summed in the same
            way.
    """

    measures: tuple[str, ...]

    def count(self, labels: Tensor) -> int:
        """Returns the number of terms of the sum, from labels [B, S]."""

    def __call__(self, losses: Tensor, microbatch: Microbatch) -> Tensor:
        """Returns an fp32 scalar from the tokens' losses [S, B], which are 0 for tokens without
        one."""


class TokenLoss:
    """The sum of the tokens' losses."""

    measures: tuple[str, ...] = ()

    def count(self, labels: Tensor) -> int:
        return int((labels >= 0).sum())

    def __call__(self, losses: Tensor, microbatch: Microbatch) -> Tensor:
        return losses.sum()


class PreferenceLoss:
    """The sum of the pairs' losses; stores each sequence's log-probability in
    `microbatch.log_probs`."""

    measures: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracy",
        "log_probs/chosen",
        "log_probs/rejected",
    )

    def __init__(self, task: str, settings: PreferenceConfig) -> None:
        self.task = task
        self.beta = settings.beta if settings.beta is not None else DEFAULT_BETA[task]
        self.margin, self.smoothing = settings.margin, settings.label_smoothing

    def count(self, labels: Tensor) -> int:
        return int(_has_pair(labels).sum())

    def __call__(self, losses: Tensor, microbatch: Microbatch) -> Tensor:
        log_probs = -losses.sum(0)
        microbatch.log_probs = log_probs.detach()
        means = log_probs / (microbatch.labels >= 0).sum(1).clamp(min=1)
        rewards = self.beta * means
        if self.task == "dpo":
            reference = microbatch.reference
            if reference is None:
                reference = torch.zeros_like(log_probs)
            rewards = self.beta * (log_probs - reference)
        chosen, rejected = rewards[0::2], rewards[1::2]
        padding = ~_has_pair(microbatch.labels)
        measured = torch.stack(
            [
                chosen,
                rejected,
                chosen - rejected,
                (chosen > rejected).float(),
                log_probs[0::2],
                log_probs[1::2],
            ]
        )
        microbatch.measured = measured.detach().masked_fill(padding, 0.0).sum(1)
        return self._losses(chosen, rejected, means).masked_fill(padding, 0.0).sum()

    def _losses(self, chosen: Tensor, rejected: Tensor, means: Tensor) -> Tensor:
        """Returns the pairs' losses [B / 2] from their rewards [B / 2] and mean log-probabilities
        [B]."""
        if self.task == "orpo":
            log_odds_ratio = _log_odds(means[0::2]) - _log_odds(means[1::2])
            return -means[0::2] - self.beta * F.logsigmoid(log_odds_ratio)
        logits = chosen - rejected - (self.margin if self.task == "simpo" else 0.0)
        swapped = self.smoothing * F.logsigmoid(-logits)
        return -(1 - self.smoothing) * F.logsigmoid(logits) - swapped


DEFAULT_BETA = {"dpo": 0.1, "simpo": 2.0, "orpo": 0.1}
"""Beta of the papers' experiments, which later trainers use as well."""


def make_objective(task: str, settings: PreferenceConfig) -> Objective:
    """Returns the objective of a task."""
    return PreferenceLoss(task, settings) if task in DEFAULT_BETA else TokenLoss()


def _has_pair(labels: Tensor) -> Tensor:
    """Returns bool [B / 2]: False for the padding of a last step, whose pairs have no labels."""
    return (labels >= 0).any(1)[0::2]


def _log_odds(mean: Tensor) -> Tensor:
    """Returns log(p / (1 - p)) of p = exp(mean); a p that rounds to 1 is clamped just below."""
    mean = mean.clamp(max=-1e-7)
    return mean - torch.log(-torch.expm1(mean))
