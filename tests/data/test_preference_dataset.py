"""Preference pairs: formats of records, consecutive positions, and invalid records."""

from __future__ import annotations

import json

import pytest
from helpers.chat_templates import CHATML

from megatrain.data.chat_format import BadSample
from megatrain.data.chat_preprocess import SFTSpec, prepare_data, read_counts
from megatrain.data.gpt_dataset import BlendedDataset
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preference_dataset import PreferenceDataset, read_pair
from megatrain.errors import DataError

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Hi"), ("assistant", "Hello you"), ("assistant", "Bye"))
)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Hello you", "rejected": "Bye"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "as some data sets have it", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_a_record_is_two_conversations(record):
    chosen, rejected = read_pair(record)
    assert [(m["role"], m["content"]) for m in chosen.messages] == [
        ("user", "Hi"),
        ("assistant", "Hello you"),
    ]
    assert [m["content"] for m in rejected.messages] == ["Hi", "Bye"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"prompt": "Hi", "chosen": "Hello"},
            "it has prompt, chosen; required: prompt, chosen and rejected",
        ),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}, "are the same answer"),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Ho"}, BAD]},
            "do not answer the same prompt",
        ),
        (
            {"chosen": "Hello", "rejected": "Bye"},
            '"chosen" without a prompt must be a full conversation',
        ),
        (
            {"prompt": "Hi", "chosen": "Hello", "rejected": " "},
            '"rejected": message 2 is an empty assistant turn',
        ),
        ({"prompt": "Hi", "chosen": 3, "rejected": "Bye"}, '"chosen": field "chosen" is not text'),
        ({"prompt": [GOOD], "chosen": "Hello", "rejected": "Bye"}, "roles out of order"),
    ],
)
def test_a_bad_record_says_why(record, reason):
    with pytest.raises(BadSample) as error:
        read_pair(record)
    assert reason in str(error.value)


@pytest.fixture
def spec(tokenizer_folder, tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    return SFTSpec(
        str(tokenizer_folder),
        str(tmp_path / "chatml.jinja"),
        "assistant",
        "truncate",
        80,
        pairs=True,
    )


def write(path, count):
    records = [
        {"prompt": f"number {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_pairs_stay_together_through_epochs_and_blends(spec, tmp_path):
    data = IndexedDataset(
        prepare_data(
            str(write(tmp_path / "pairs.jsonl", 7)), spec, folder=tmp_path / "data", name="train0"
        )
    )
    samples = PreferenceDataset(data, sequence_length=80, packing=False, seed=3, padding=0)
    assert samples.samples_per_epoch == 14
    orders = []
    for epoch in range(2):
        rows = [samples.fetch(14 * epoch + position) for position in range(14)]
        numbers = []
        for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True):
            prompt = int((chosen.labels >= 0).argmax())
            assert (chosen.tokens[: prompt + 1] == rejected.tokens[: prompt + 1]).all()
            assert (chosen.labels[prompt:] != rejected.labels[prompt:]).any()
            numbers.append(tuple(chosen.tokens))
        assert len(set(numbers)) == 7
        orders.append(numbers)
    assert orders[0] != orders[1]
    blended = BlendedDataset(
        [samples, PreferenceDataset(data, sequence_length=80, packing=False, seed=4, padding=0)],
        weights=[0.5, 0.5],
        seed=1,
        each=2,
    )
    for position in range(0, 20, 2):
        chosen, rejected = blended.fetch(position), blended.fetch(position + 1)
        prompt = int((chosen.labels >= 0).argmax())
        assert (chosen.tokens[: prompt + 1] == rejected.tokens[: prompt + 1]).all()
    samples.limit = 14
    assert not (samples.fetch(14).labels >= 0).any()


def test_the_last_answer_alone_is_compared(spec, tmp_path):
    turns = [USER, {"role": "assistant", "content": "Bye"}, USER]
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}) + "\n")
    data = IndexedDataset(
        prepare_data(
            str(file), spec._replace(sequence_length=200), folder=tmp_path / "data", name="train0"
        )
    )
    from megatrain.data.chat_template import ChatTemplate

    decode = ChatTemplate(spec.tokenizer, file=spec.chat_template).tokenizer.decode
    answers = [
        decode([int(code) >> 1 for code in data.document(number) if code & 1]) for number in (0, 1)
    ]
    assert [text.replace("<|im_end|>", "").strip() for text in answers] == ["Hello you", "Bye"]


@pytest.mark.parametrize(("too_long", "samples", "left_out"), [("truncate", 2, 0), ("skip", 1, 1)])
def test_too_long_is_of_the_pair(spec, too_long, samples, left_out, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
        + "\n"
        + json.dumps({"prompt": "a", "chosen": "b", "rejected": "long " * 80})
        + "\n"
    )
    prefix = prepare_data(
        str(file), spec._replace(too_long=too_long), folder=tmp_path / "data", name="train0"
    )
    counts = read_counts(prefix)
    assert (counts.samples, counts.skipped, IndexedDataset(prefix).num_documents) == (
        samples,
        left_out,
        2 * samples,
    )


def test_a_bad_record_is_named_by_file_and_line(spec, tmp_path):
    file = write(tmp_path / "pairs.jsonl", 3)
    file.write_text(
        file.read_text() + json.dumps({"prompt": "Hi", "chosen": "x", "rejected": "x"}) + "\n"
    )
    with pytest.raises(DataError, match=r"pairs.jsonl.*4.*the same answer"):
        prepare_data(str(file), spec, folder=tmp_path / "data", name="train0")
