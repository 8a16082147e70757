"""What the head makes of its tokens' losses: their sum, or a loss over pairs of a preferred and a rejected answer.

    pairs in a microbatch of B sequences, never split:    chosen 0 | rejected 0 | chosen 1 | rejected 1 | ...

With log-probabilities summed over an answer's tokens (log p) or averaged over them (mean), of the model and of the reference
that it started from (log r), d being what the chosen answer has more than the rejected one,

    dpo      -log sigmoid(beta d(log p - log r))                                    arXiv 2305.18290, equation 7
    simpo    -log sigmoid(beta d(mean) - margin)                                    arXiv 2405.14734, equation 6
    orpo     -mean of the chosen - beta log sigmoid(d(log odds of mean))            arXiv 2403.07691, equations 4 to 7

`label_smoothing` mixes in the loss of the pair turned around, for labels that may be wrong (cDPO). A pair's reward is what its
sigmoid compares: beta (log p - log r), or beta mean.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.config.schema import PreferenceConfig
from megatrain.models.microbatch import Microbatch


class Objective(Protocol):
    """The scalar that the head returns, as a sum over what is counted.

    Attributes:
        measures: names of what it leaves in `context.measured`, summed over what is counted as well.
    """

    measures: tuple[str, ...]

    def count(self, labels: Tensor) -> int:
        """How many terms the sum has, from labels [B, S]."""

    def __call__(self, losses: Tensor, microbatch: Microbatch) -> Tensor:
        """fp32 scalar from the tokens' losses [S, B], 0 where there is none."""


class TokenLoss:
    """The sum of the tokens' losses."""

    measures: tuple[str, ...] = ()

    def count(self, labels: Tensor) -> int:
        return int((labels >= 0).sum())

    def __call__(self, losses: Tensor, microbatch: Microbatch) -> Tensor:
        return losses.sum()


class PreferenceLoss:
    """The sum of the pairs' losses; leaves each sequence's log-probability in `context.log_probs`."""

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
        return int(_present(labels).sum())

    def __call__(self, losses: Tensor, microbatch: Microbatch) -> Tensor:
        log_probs, lengths = -losses.sum(0), (microbatch.labels >= 0).sum(1)
        microbatch.log_probs = log_probs.detach()
        means = log_probs / lengths.clamp(min=1)
        if self.task == "dpo":
            reference = (
                microbatch.reference
                if microbatch.reference is not None
                else torch.zeros_like(log_probs)
            )
            rewards = self.beta * (log_probs - reference)
        else:
            rewards = self.beta * means
        chosen, rejected = rewards[0::2], rewards[1::2]
        if self.task == "orpo":
            pairs = -means[0::2] - self.beta * F.logsigmoid(
                _log_odds(means[0::2]) - _log_odds(means[1::2])
            )
        else:
            logits = chosen - rejected - (self.margin if self.task == "simpo" else 0.0)
            pairs = -(1 - self.smoothing) * F.logsigmoid(logits) - self.smoothing * F.logsigmoid(
                -logits
            )
        present = _present(microbatch.labels)
        told = torch.stack(
            [
                chosen,
                rejected,
                chosen - rejected,
                (chosen > rejected).float(),
                log_probs[0::2],
                log_probs[1::2],
            ]
        )
        microbatch.measured = told.detach().masked_fill(~present, 0.0).sum(1)
        return pairs.masked_fill(~present, 0.0).sum()


DEFAULT_BETA = {"dpo": 0.1, "simpo": 2.0, "orpo": 0.1}
"""Of the papers' own experiments, and of what trains with them since."""


def make_objective(task: str, settings: PreferenceConfig) -> Objective:
    """What `task` asks of the head."""
    return PreferenceLoss(task, settings) if task in DEFAULT_BETA else TokenLoss()


def _present(labels: Tensor) -> Tensor:
    """bool [B / 2]: pairs with tokens to compare, and not the padding of a last step."""
    return (labels >= 0).any(1)[0::2]


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean); a p that rounds to 1 is held just below."""
    mean = mean.clamp(max=-1e-7)
    return mean - torch.log(-torch.expm1(mean))
