"""Multiple choice by log-likelihood: which of the answers does the model find most likely after the question?

One JSON object a line: `question` or `context` (text), `choices` (texts), `answer` (a number from 0, a letter from A, or the
right choice itself). Context and choice are tokenised together, so that what stands on both sides of their border is one
token where it would be in a text; trailing spaces of the context go to the choice. Both are lm-evaluation-harness's ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatrain.data.records import parse_objects
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import DataError
from megatrain.evaluation.windows import Row, row

CONTEXT_FIELDS = ("question", "context")


class Question(NamedTuple):
    """A question with its answers, and where it was read."""

    context: str
    choices: list[str]
    answer: int
    place: str


class ChoiceRequest(NamedTuple):
    """A row for the model, and whether tokens of its context were left out to make it fit."""

    row: Row
    shortened: bool


def looks_like_choices(path: str) -> bool:
    """Whether the first record of a file has choices; False for a file of something else."""
    for block in read_blocks(find_inputs([path]).files, field=None):
        if block.form == "file":
            return False
        objects, _ = parse_objects(block._replace(records=block.records[:1]))
        return bool(objects) and "choices" in objects[0][1]
    return False


def read_questions(data: Sequence[str]) -> Iterator[Question]:
    """All questions of JSONL or parquet files in order; DataError naming file and line."""
    for block in read_blocks(find_inputs(list(data)).files, field=None):
        objects, problems = parse_objects(block)
        if problems:
            raise DataError(str(problems[0]))
        for number, value in objects:
            yield _question(value, f"{block.path}, {block.form} {number}")


def _question(value: dict[str, Any], place: str) -> Question:
    context = next((value[name] for name in CONTEXT_FIELDS if name in value), None)
    if not isinstance(context, str) or not context.strip():
        raise DataError(f"{place}: no text in `question` or `context`")
    choices = value.get("choices")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c.strip() for c in choices)
    ):
        raise DataError(f"{place}: `choices` is not a list of two texts or more")
    return Question(context, choices, _answer(value.get("answer"), choices, place), place)


def _answer(answer: object, choices: list[str], place: str) -> int:
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if len(answer) == 1 and answer.isalpha():
            answer = ord(answer.upper()) - ord("A")
        elif answer.isdigit():
            answer = int(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(
            f"{place}: `answer` is {answer!r}, none of the {len(choices)} choices (a number from 0, a letter from A, or a choice)"
        )
    return answer


def make_request(
    context: str, continuation: str, *, tokenizer: Any, prefix: int | None, window: int
) -> ChoiceRequest:
    """The row that asks for the continuation after the context; an empty context is the prefix token."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if context:
        whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        after = (
            whole[len(before) :] or tokenizer(continuation, add_special_tokens=False)["input_ids"]
        )
    else:
        before, after = [], tokenizer(continuation, add_special_tokens=False)["input_ids"]
    return token_request(before, after, prefix=prefix, window=window)


def token_request(
    before: list[int], after: list[int], *, prefix: int | None, window: int
) -> ChoiceRequest:
    """The row that asks for tokens `after` given those `before`; what does not fit is left out from the front."""
    if not before and prefix is not None:
        before = [prefix]
    tokens = [*before, *after]
    kept = tokens[-(window + 1) :]
    scored = min(len(after), len(kept) - 1)
    return ChoiceRequest(
        row(kept, scored=scored) if len(kept) > 1 else Row([0], [-100]), len(kept) < len(tokens)
    )


def with_delimiter(context: str, choice: str) -> str:
    """The choice as it goes on from the context: a space between them where there is none."""
    return choice if context[-1].isspace() or choice[0].isspace() else f" {choice}"
