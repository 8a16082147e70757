"""Multiple choice by log-likelihood: the most likely answer of a question is chosen.

A file has one JSON object a line: `question` or `context` (text), `choices` (texts), `answer` (a
number from 0, a letter from A, or the right choice itself). As in lm-evaluation-harness, context
and choice are tokenised together, and trailing spaces of the context belong to the choice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from megatrain.data.records import parse_objects
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import DataError
from megatrain.evaluation.loglikelihood import IGNORED, Row, Scorer, make_row
from megatrain.evaluation.spec import EvalSpec

CONTEXT_FIELDS = ("question", "context")


class Question(NamedTuple):
    """A question, its choices, and the number of the right one."""

    context: str
    choices: list[str]
    answer: int


class ChoiceRequest(NamedTuple):
    """A row for the model, and whether its context was truncated to fit the window."""

    row: Row
    truncated: bool


def has_questions(path: str) -> bool:
    """Returns whether the first record of a file has choices."""
    for block in read_blocks(find_inputs([path]).files, field=None):
        if block.form == "file":
            return False
        objects, _ = parse_objects(block._replace(records=block.records[:1]))
        return bool(objects) and "choices" in objects[0][1]
    return False


def read_questions(data: Sequence[str]) -> Iterator[Question]:
    """Yields the questions of JSONL or parquet files; raises DataError with file and line."""
    for block in read_blocks(find_inputs(list(data)).files, field=None):
        objects, problems = parse_objects(block)
        if problems:
            raise DataError(str(problems[0]))
        for number, value in objects:
            yield _parse_question(value, f"{block.path}, {block.form} {number}")


def _parse_question(value: dict[str, Any], location: str) -> Question:
    context = next((value[name] for name in CONTEXT_FIELDS if name in value), None)
    if not isinstance(context, str) or not context.strip():
        raise DataError(f"{location}: `question` or `context` must be a text")
    choices = value.get("choices")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c.strip() for c in choices)
    ):
        raise DataError(f"{location}: `choices` must be a list of at least two texts")
    return Question(context, choices, _parse_answer(value.get("answer"), choices, location))


def _parse_answer(answer: object, choices: list[str], location: str) -> int:
    number = answer
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if len(answer) == 1 and answer.isalpha():
            number = ord(answer.upper()) - ord("A")
        elif answer.isdigit():
            number = int(answer)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(choices):
        raise DataError(
            f"{location}: `answer` is {answer!r}, but must be a number from 0 to "
            f"{len(choices) - 1}, a letter from A, or one of the choices"
        )
    return number


def make_request(
    context: str, continuation: str, *, tokenizer: Any, prefix: int | None, window: int
) -> ChoiceRequest:
    """Returns the row that scores a continuation after its context.

    The prefix token replaces an empty context. A context that exceeds the window is truncated from
    the front.
    """
    num_spaces = len(context) - len(context.rstrip())
    if num_spaces:
        context, continuation = context[:-num_spaces], context[-num_spaces:] + continuation
    if context:
        both = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        after = both[len(before) :]
        if not after:
            after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    else:
        before, after = [], tokenizer(continuation, add_special_tokens=False)["input_ids"]
    return make_token_request(before, after, prefix=prefix, window=window)


def make_token_request(
    before: list[int], after: list[int], *, prefix: int | None, window: int
) -> ChoiceRequest:
    """Returns the row that scores tokens `after` given those `before`."""
    if not before and prefix is not None:
        before = [prefix]
    tokens = [*before, *after]
    kept = tokens[-(window + 1) :]
    scored = min(len(after), len(kept) - 1)
    row = make_row(kept, scored=scored) if len(kept) > 1 else Row([0], [IGNORED])
    return ChoiceRequest(row, len(kept) < len(tokens))


def add_delimiter(context: str, choice: str) -> str:
    """Returns the choice with a space before it, unless a space separates it from the context."""
    return choice if context[-1].isspace() or choice[0].isspace() else f" {choice}"


class ChoiceResult:
    """Accuracy of the most likely choice (acc), and of the most likely per byte (acc_norm)."""

    def __init__(self) -> None:
        self.correct: list[int] = []
        self.correct_by_byte: list[int] = []
        self.truncated = 0

    def add(self, loglikelihoods: list[float], choices: list[str], answer: int) -> None:
        """Adds one question."""
        by_byte = [
            value / len(choice.encode())
            for value, choice in zip(loglikelihoods, choices, strict=True)
        ]
        self.correct.append(int(_argmax(loglikelihoods) == answer))
        self.correct_by_byte.append(int(_argmax(by_byte) == answer))

    def metrics(self) -> dict[str, float | int | None]:
        """Returns the accuracies, their standard errors, and the counts."""
        return {
            "acc": fmean(self.correct),
            "acc_stderr": standard_error(self.correct),
            "acc_norm": fmean(self.correct_by_byte),
            "acc_norm_stderr": standard_error(self.correct_by_byte),
            "questions": len(self.correct),
            "shortened": self.truncated,
        }


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the standard error of the mean; None for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _argmax(values: list[float]) -> int:
    """Returns the index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def measure_choices(
    spec: EvalSpec, scorer: Scorer, tokenizer: Any, prefix: int | None
) -> ChoiceResult:
    """Returns the accuracy over all questions of `spec.data`; all ranks call it together."""
    result = ChoiceResult()
    pending: deque[Question] = deque()

    def rows() -> Iterator[Row]:
        for question in read_questions(spec.data):
            pending.append(question)
            for choice in question.choices:
                request = make_request(
                    question.context,
                    add_delimiter(question.context, choice),
                    tokenizer=tokenizer,
                    prefix=prefix,
                    window=spec.window,
                )
                result.truncated += request.truncated
                yield request.row

    scores = scorer.scores(rows())
    for first in scores:
        question = pending.popleft()
        rest = [next(scores).loglikelihood for _ in question.choices[1:]]
        result.add([first.loglikelihood, *rest], question.choices, question.answer)
    if not result.correct:
        raise DataError(f"{', '.join(spec.data)} contains no question")
    return result
