"""The measurements themselves: texts or questions to rows, rows to scores, scores to figures."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from megatrain.data.classification_dataset import encode_text, read_labelled_texts
from megatrain.errors import DataError
from megatrain.evaluation import classification_metrics
from megatrain.evaluation.loglikelihood import Scorer
from megatrain.evaluation.multiple_choice import (
    Question,
    make_request,
    read_questions,
    with_delimiter,
)
from megatrain.evaluation.progress import ProgressBar
from megatrain.evaluation.results import ChoiceResults, PerplexityResult
from megatrain.evaluation.spec import EvalSpec
from megatrain.evaluation.texts import Text, read_texts
from megatrain.evaluation.windows import Row, rows, windows
from megatrain.models.config import TransformerConfig
from megatrain.training.task_classification import figures_of, reading


class EvalResult(NamedTuple):
    """What was measured: figures, and where labels were told, those of each class and how often one was taken for another."""

    figures: dict[str, Any]
    classes: dict[str, dict[str, float]]
    confusion: classification_metrics.Matrix | None


def perplexity(
    subject: EvalSpec,
    scorer: Scorer,
    tokenizer: Any,
    prefix: int | None,
    vocab_size: int,
    progress: ProgressBar,
) -> PerplexityResult:
    """Over all documents, each on its own."""
    texts = read_texts(
        subject.data, tokenizer=tokenizer, prefix=prefix, field=subject.field, vocab_size=vocab_size
    )
    found = PerplexityResult()
    waiting: deque[tuple[Text, int]] = deque()
    """Documents whose rows are on their way, and how many."""

    def all_rows() -> Iterator[Row]:
        for text in texts:
            count = sum(
                1
                for _ in windows(len(text.tokens) - 1, window=subject.window, stride=subject.stride)
            )
            if count:
                waiting.append((text, count))
                yield from rows(text.tokens, window=subject.window, stride=subject.stride)

    scores = scorer.scores(progress.watch(all_rows()))
    for first in scores:
        text, count = waiting.popleft()
        total = first.loglikelihood + sum(next(scores).loglikelihood for _ in range(count - 1))
        found.add(
            loglikelihood=total,
            tokens=len(text.tokens) - 1,
            num_bytes=text.num_bytes,
            num_words=text.num_words,
        )
    if not found.tokens:
        raise DataError(f"{', '.join(subject.data)} holds no document of two tokens or more")
    return found


def choices(
    subject: EvalSpec, scorer: Scorer, tokenizer: Any, prefix: int | None, progress: ProgressBar
) -> ChoiceResults:
    """Over all questions."""
    if tokenizer is None:
        raise DataError(
            f"there is no tokenizer beside {subject.model}, and questions are text; give data.tokenizer=FOLDER"
        )
    found = ChoiceResults()
    waiting: deque[Question] = deque()

    def all_rows(questions: Iterable[Question]) -> Iterator[Row]:
        for question in questions:
            waiting.append(question)
            for choice in question.choices:
                asked = make_request(
                    question.context,
                    with_delimiter(question.context, choice),
                    tokenizer=tokenizer,
                    prefix=prefix,
                    window=subject.window,
                )
                found.shortened += asked.shortened
                yield asked.row

    scores = scorer.scores(progress.watch(all_rows(read_questions(subject.data))))
    for first in scores:
        question = waiting.popleft()
        likely = [first.loglikelihood, *(next(scores).loglikelihood for _ in question.choices[1:])]
        found.add(likely, question.choices, question.answer)
    if not found.right:
        raise DataError(f"{', '.join(subject.data)} holds no question")
    return found


def classification(
    subject: EvalSpec,
    scorer: Scorer,
    tokenizer: Any,
    architecture: TransformerConfig,
    progress: ProgressBar,
) -> EvalResult:
    """Over all texts with labels."""
    if tokenizer is None:
        raise DataError(f"there is no tokenizer beside {subject.model}; give data.tokenizer=FOLDER")
    classifier, as_read = scorer.classifier, reading(architecture)
    assert classifier is not None
    texts = [text for path in subject.data for text in read_labelled_texts(path, as_read)]
    encoded = [
        encode_text(
            text,
            tokenizer,
            of_tokens=classifier.of_tokens,
            length=subject.window,
            padding=architecture.padding_token or 0,
        )
        for text in texts
    ]
    told = list(scorer.told(progress.watch(Row(some.tokens, some.labels) for some in encoded)))
    numbers = np.array([label for some in encoded for label in some.labels if label >= 0])
    if classifier.of_tokens:
        said = np.array(
            [
                int(row[place])
                for row, some in zip(told, encoded, strict=True)
                for place, label in enumerate(some.labels)
                if label >= 0
            ]
        )
        figures: dict[str, Any] = dict(
            classification_metrics.single_label(numbers, said, classifier.num_labels)
        )
    else:
        scores = np.array(told)
        said, figures = scores.argmax(1), dict(figures_of(scores, numbers, classifier))
    figures |= {
        "samples": len(texts),
        "labelled": len(numbers),
        "cut": sum(some.is_truncated for some in encoded),
    }
    if classifier.problem != "single-label":
        return EvalResult(figures, {}, None)
    matrix = classification_metrics.confusion_matrix(numbers, said, classifier.num_labels)
    return EvalResult(figures, classification_metrics.named_classes(matrix, as_read.labels), matrix)
