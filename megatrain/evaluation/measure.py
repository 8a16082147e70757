"""The measurements themselves: texts or questions to rows, rows to scores, scores to figures."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from megatrain.errors import DataError
from megatrain.evaluation.choices import Question, read_questions, request, with_delimiter
from megatrain.evaluation.figures import Choices, Perplexity
from megatrain.evaluation.progress import Progress
from megatrain.evaluation.scorer import Scorer
from megatrain.evaluation.subject import Subject
from megatrain.evaluation.texts import Text, read_texts
from megatrain.evaluation.windows import Row, rows


def perplexity(subject: Subject, scorer: Scorer, tokenizer: Any, prefix: int | None, vocab_size: int, progress: Progress) -> Perplexity:
    """Over all documents, each on its own."""
    texts = read_texts(subject.data, tokenizer=tokenizer, prefix=prefix, field=subject.field, vocab_size=vocab_size)
    found = Perplexity()
    waiting: deque[tuple[Text, int]] = deque()
    """Documents whose rows are on their way, and how many."""

    def all_rows() -> Iterator[Row]:
        for text in texts:
            made = list(rows(text.tokens, window=subject.window, stride=subject.stride))
            if made:
                waiting.append((text, len(made)))
                yield from made

    scores = scorer.scores(progress.watch(all_rows()))
    for first in scores:
        text, count = waiting.popleft()
        total = first.loglikelihood + sum(next(scores).loglikelihood for _ in range(count - 1))
        found.add(loglikelihood=total, tokens=len(text.tokens) - 1, num_bytes=text.num_bytes, num_words=text.num_words)
    if not found.tokens:
        raise DataError(f"{', '.join(subject.data)} holds no document of two tokens or more")
    return found


def choices(subject: Subject, scorer: Scorer, tokenizer: Any, prefix: int | None, progress: Progress) -> Choices:
    """Over all questions."""
    if tokenizer is None:
        raise DataError(f"there is no tokenizer beside {subject.model}, and questions are text; give data.tokenizer=FOLDER")
    found = Choices()
    waiting: deque[Question] = deque()

    def all_rows(questions: Iterable[Question]) -> Iterator[Row]:
        for question in questions:
            waiting.append(question)
            for choice in question.choices:
                asked = request(question.context, with_delimiter(question.context, choice), tokenizer=tokenizer, prefix=prefix,
                                window=subject.window)  # fmt: skip
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
