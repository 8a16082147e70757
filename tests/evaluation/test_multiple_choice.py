"""Questions are read as they are written, tokenised as the harness does it, and refused by file and line."""

from __future__ import annotations

import json

import pytest

from megatrain.errors import DataError
from megatrain.evaluation.multiple_choice import (
    looks_like_choices,
    make_request,
    read_questions,
    token_request,
    with_delimiter,
)
from megatrain.evaluation.results import ChoiceResults, PerplexityResult
from megatrain.evaluation.windows import IGNORED

GOOD = {"question": "Who?", "choices": ["me", "you"], "answer": 1}


class Letters:
    """A tokenizer whose tokens are characters, but for `ab`, which is one."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text.replace("ab", "Ω")]}


def read(tmp_path, *records):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_questions([str(file)]))


@pytest.mark.parametrize("answer", [1, "B", "b", "you", "1"])
def test_an_answer_is_a_number_a_letter_or_the_choice(tmp_path, answer):
    (question,) = read(tmp_path, {**GOOD, "answer": answer})
    assert (question.context, question.choices, question.answer) == ("Who?", ["me", "you"], 1)


def test_the_context_may_be_called_context(tmp_path):
    assert (
        read(tmp_path, {"context": "Who?", "choices": ["a", "b"], "answer": "a"})[0].context
        == "Who?"
    )


BAD = {
    "answer beyond": ({**GOOD, "answer": 2}, "`answer` is 2, none of the 2 choices"),
    "negative answer": ({**GOOD, "answer": -1}, "`answer` is -1, none of the 2"),
    "no answer": ({"question": "Who?", "choices": ["me", "you"]}, "`answer` is None"),
    "true for an answer": ({**GOOD, "answer": True}, "`answer` is True"),
    "another word": ({**GOOD, "answer": "him"}, "`answer` is 'him'"),
    "no question": ({"choices": ["a", "b"], "answer": 0}, "no text in `question` or `context`"),
    "one choice": (
        {**GOOD, "choices": ["me"], "answer": 0},
        "`choices` is not a list of two texts or more",
    ),
    "an empty choice": ({**GOOD, "choices": ["me", ""]}, "`choices` is not"),
    "no object": ([1, 2], "not a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_question_is_named_by_file_and_line(tmp_path, name):
    record, sentence = BAD[name]
    with pytest.raises(DataError) as error:
        read(tmp_path, GOOD, record)
    assert str(error.value).startswith(f"{tmp_path}/questions.jsonl, line 2: {sentence}")


def test_files_of_questions_are_told_from_texts(tmp_path):
    for name, text, expected in (
        ("q.jsonl", json.dumps(GOOD), True),
        ("t.jsonl", '{"text": "choices"}', False),
        ("t.txt", json.dumps(GOOD), False),
        ("bad.jsonl", "choices", False),
    ):
        (tmp_path / name).write_text(text + "\n")
        assert looks_like_choices(str(tmp_path / name)) is expected


def asked(context, continuation, *, window=10):
    made = make_request(context, continuation, tokenizer=Letters(), prefix=0, window=window)
    scored = "".join(chr(label) for label in made.row.labels if label != IGNORED)
    return "".join(map(chr, made.row.tokens)), scored, made.shortened


def test_what_is_scored_of_a_choice():
    assert asked("xy", " z") == ("xy ", " z", False)
    assert asked("xy ", "z") == ("xy ", " z", False)  # the space goes to the choice
    assert asked("xa", "bz") == (
        "xa",
        "z",
        False,
    )  # a token on both sides of the border is left out, as the harness does
    assert asked("xa", "b") == ("xa", "b", False)  # but not where nothing else is there
    assert asked("", "zz") == ("\0z", "zz", False)  # nothing before: the prefix token
    assert asked("uvwxy", "z", window=3) == ("wxy", "z", True)
    assert asked("x", "uvwxyz", window=3) == ("wxy", "xyz", True)  # a choice longer than the window
    assert token_request([1, 2], [3], prefix=0, window=5).row == ([1, 2], [IGNORED, 3])


def test_a_space_stands_between_context_and_choice():
    assert [
        with_delimiter("Who?", "me"),
        with_delimiter("Who? ", "me"),
        with_delimiter("Who?", "\nme"),
    ] == [" me", "me", "\nme"]


def test_accuracies():
    found = ChoiceResults()
    found.add([-3.0, -4.0], ["me", "you"], 0)  # by byte -1.5 and -1.33
    found.add([-3.0, -4.0], ["me", "you"], 1)
    found.add([-9.0, -1.0, -1.0], ["a", "b", "c"], 1)  # the first of equals
    figures = found.figures()
    assert (figures["acc"], figures["acc_norm"], figures["questions"]) == (2 / 3, 2 / 3, 3)
    assert found.right == [1, 0, 1]
    assert found.right_by_byte == [0, 1, 1]
    assert figures["acc_stderr"] == pytest.approx((1 / 3 / 3) ** 0.5)


def test_perplexity_by_hand():
    found = PerplexityResult()
    found.add(loglikelihood=-6.0, tokens=3, num_bytes=9, num_words=2)
    found.add(loglikelihood=-2.0, tokens=1, num_bytes=1, num_words=1)
    figures = found.figures()
    assert figures["loss"] == 2.0
    assert figures["perplexity"] == pytest.approx(7.389056)
    assert figures["bits_per_byte"] == pytest.approx(8 / 10 / 0.69314718)
    assert figures["word_perplexity"] == pytest.approx(2.718281828 ** (8 / 3))
    found.add(loglikelihood=-1.0, tokens=1, num_bytes=None, num_words=None)
    assert found.figures()["bits_per_byte"] is None
