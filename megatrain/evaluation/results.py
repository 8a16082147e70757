"""What an evaluation says: figures as sums that scores are added to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean


@dataclass
class PerplexityResult:
    """Of a stream of documents. Bytes and words are None once a document came without them."""

    documents: int = 0
    tokens: int = 0
    num_bytes: int | None = 0
    num_words: int | None = 0
    loglikelihood: float = 0.0

    def add(
        self, *, loglikelihood: float, tokens: int, num_bytes: int | None, num_words: int | None
    ) -> None:
        """Take in a document's sum over its tokens."""
        self.documents += 1
        self.tokens += tokens
        self.loglikelihood += loglikelihood
        self.num_bytes = (
            None if num_bytes is None or self.num_bytes is None else self.num_bytes + num_bytes
        )
        self.num_words = (
            None if num_words is None or self.num_words is None else self.num_words + num_words
        )

    def figures(self) -> dict[str, float | int | None]:
        """Nats a token, perplexities, and bits a byte: what does not depend on the tokenizer."""
        loss = -self.loglikelihood
        return {
            "loss": loss / self.tokens,
            "perplexity": _exp(loss / self.tokens),
            "bits_per_byte": loss / math.log(2) / self.num_bytes if self.num_bytes else None,
            "bits_per_word": loss / math.log(2) / self.num_words if self.num_words else None,
            "word_perplexity": _exp(loss / self.num_words) if self.num_words else None,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "words": self.num_words,
        }


class ChoiceResults:
    """Accuracy over questions: the likeliest choice, and the likeliest a byte (acc_norm), with standard errors."""

    def __init__(self) -> None:
        self.right: list[int] = []
        self.right_by_byte: list[int] = []
        self.shortened = 0

    def add(self, loglikelihoods: list[float], choices: list[str], answer: int) -> None:
        """Take in one question."""
        by_byte = [
            value / len(choice.encode())
            for value, choice in zip(loglikelihoods, choices, strict=True)
        ]
        self.right.append(int(_first_largest(loglikelihoods) == answer))
        self.right_by_byte.append(int(_first_largest(by_byte) == answer))

    def figures(self) -> dict[str, float | int | None]:
        """Accuracies with their standard errors, and what they are of."""
        return {
            "acc": fmean(self.right),
            "acc_stderr": standard_error(self.right),
            "acc_norm": fmean(self.right_by_byte),
            "acc_norm_stderr": standard_error(self.right_by_byte),
            "questions": len(self.right),
            "shortened": self.shortened,
        }


def standard_error(values: list[int]) -> float | None:
    """Of the mean; None of a single value."""
    if len(values) < 2:
        return None
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _first_largest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
