"""Questions are parsed, tokenised as in lm-evaluation-harness, and scored."""

from __future__ import annotations

import json

import pytest

from megatrain.errors import DataError
from megatrain.evaluation.loglikelihood import IGNORED
from megatrain.evaluation.multiple_choice import (
    ChoiceResult,
    add_delimiter,
    has_questions,
    make_request,
    make_token_request,
    read_questions,
)
from megatrain.evaluation.perplexity import PerplexityResult

GOOD = {"question": "Who?", "choices": ["me", "you"], "answer": 1}


class Letters:
    """A tokenizer whose tokens are characters, except `ab`, which is one token."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text.replace("ab", "Ω")]}


def read(tmp_path, *records):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_questions([str(file)]))


@pytest.mark.parametrize("answer", [1, "B", "b", "you", "1"])
def test_answer_is_a_number_a_letter_or_the_choice(tmp_path, answer):
    (question,) = read(tmp_path, {**GOOD, "answer": answer})
    assert (question.context, question.choices, question.answer) == ("Who?", ["me", "you"], 1)


def test_context_field(tmp_path):
    assert (
        read(tmp_path, {"context": "Who?", "choices": ["a", "b"], "answer": "a"})[0].context
        == "Who?"
    )


BAD = {
    "answer beyond": ({**GOOD, "answer": 2}, "`answer` is 2, but must be a number from 0 to 1"),
    "negative answer": ({**GOOD, "answer": -1}, "`answer` is -1, but must be"),
    "no answer": ({"question": "Who?", "choices": ["me", "you"]}, "`answer` is None"),
    "true for an answer": ({**GOOD, "answer": True}, "`answer` is True"),
    "another word": ({**GOOD, "answer": "him"}, "`answer` is 'him'"),
    "no question": ({"choices": ["a", "b"], "answer": 0}, "`question` or `context` must be a text"),
    "one choice": (
        {**GOOD, "choices": ["me"], "answer": 0},
        "`choices` must be a list of at least two texts",
    ),
    "an empty choice": ({**GOOD, "choices": ["me", ""]}, "`choices` must be"),
    "no object": ([1, 2], "not a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_question_is_located(tmp_path, name):
    record, sentence = BAD[name]
    with pytest.raises(DataError) as error:
        read(tmp_path, GOOD, record)
    assert str(error.value).startswith(f"{tmp_path}/questions.jsonl, line 2: {sentence}")


def test_files_with_questions_are_detected(tmp_path):
    for name, text, expected in (
        ("q.jsonl", json.dumps(GOOD), True),
        ("t.jsonl", '{"text": "choices"}', False),
        ("t.txt", json.dumps(GOOD), False),
        ("bad.jsonl", "choices", False),
    ):
        (tmp_path / name).write_text(text + "\n")
        assert has_questions(str(tmp_path / name)) is expected


def asked(context, continuation, *, window=10):
    made = make_request(context, continuation, tokenizer=Letters(), prefix=0, window=window)
    scored = "".join(chr(label) for label in made.row.labels if label != IGNORED)
    return "".join(map(chr, made.row.tokens)), scored, made.truncated


def test_scored_tokens_of_a_choice():
    assert asked("xy", " z") == ("xy ", " z", False)
    assert asked("xy ", "z") == ("xy ", " z", False)  # the space belongs to the choice
    assert asked("xa", "bz") == (
        "xa",
        "z",
        False,
    )  # a token across the border is not scored, as in the harness
    assert asked("xa", "b") == ("xa", "b", False)  # unless it is the only one
    assert asked("", "zz") == ("\0z", "zz", False)  # an empty context is the prefix token
    assert asked("uvwxy", "z", window=3) == ("wxy", "z", True)
    assert asked("x", "uvwxyz", window=3) == ("wxy", "xyz", True)  # a choice longer than the window
    assert make_token_request([1, 2], [3], prefix=0, window=5).row == ([1, 2], [IGNORED, 3])


def test_delimiter_between_context_and_choice():
    assert [
        add_delimiter("Who?", "me"),
        add_delimiter("Who? ", "me"),
        add_delimiter("Who?", "\nme"),
    ] == [" me", "me", "\nme"]


def test_accuracies():
    found = ChoiceResult()
    found.add([-3.0, -4.0], ["me", "you"], 0)  # by byte -1.5 and -1.33
    found.add([-3.0, -4.0], ["me", "you"], 1)
    found.add([-9.0, -1.0, -1.0], ["a", "b", "c"], 1)  # the first of equals
    figures = found.metrics()
    assert (figures["acc"], figures["acc_norm"], figures["questions"]) == (2 / 3, 2 / 3, 3)
    assert found.correct == [1, 0, 1]
    assert found.correct_by_byte == [0, 1, 1]
    assert figures["acc_stderr"] == pytest.approx((1 / 3 / 3) ** 0.5)


def test_perplexity_by_hand():
    found = PerplexityResult()
    found.add(loglikelihood=-6.0, tokens=3, num_bytes=9, num_words=2)
    found.add(loglikelihood=-2.0, tokens=1, num_bytes=1, num_words=1)
    figures = found.metrics()
    assert figures["loss"] == 2.0
    assert figures["perplexity"] == pytest.approx(7.389056)
    assert figures["bits_per_byte"] == pytest.approx(8 / 10 / 0.69314718)
    assert figures["word_perplexity"] == pytest.approx(2.718281828 ** (8 / 3))
    found.add(loglikelihood=-1.0, tokens=1, num_bytes=None, num_words=None)
    assert found.metrics()["bits_per_byte"] is None
