"""Labels of every format are at the token that transformers reads; errors name file and line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.data.classification_dataset import (
    ClassificationDataset,
    LabelledText,
    LabelSpec,
    find_labels,
    first_token_labels,
    last_token_index,
    read_labelled_texts,
)
from megatrain.data.dataloader import DataLoader
from megatrain.data.text_augmentation import augment, mask_word, split_words
from megatrain.data.tokenizer import load_tokenizer
from megatrain.errors import DataError

LABELS = ["red", "green", "blue"]
SINGLE, MULTI, NUMBER, WORDS = (
    LabelSpec(False, "single-label", LABELS),
    LabelSpec(False, "multi-label", LABELS),
    LabelSpec(False, "regression", ["value"]),
    LabelSpec(True, "single-label", LABELS),
)


def write_records(tmp_path, *records):
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def test_every_form_of_label(tmp_path):
    def labels(spec, *records):
        texts = read_labelled_texts(write_records(tmp_path, *records), spec)
        return [label for text in texts for label in text.labels]

    def targets(spec, *records):
        texts = read_labelled_texts(write_records(tmp_path, *records), spec)
        assert [text.labels for text in texts] == [[0]] * len(records)
        assert all(text.targets.dtype == np.float32 for text in texts)
        return [text.targets.tolist() for text in texts]

    assert labels(SINGLE, {"text": "a", "label": "blue"}, {"text": "a", "label": 1}) == [2, 1]
    assert targets(MULTI, {"text": "a", "labels": ["red", 2]}, {"text": "a", "labels": []}) == [
        [1.0, 0.0, 1.0],
        [0.0, 0.0, 0.0],
    ]
    assert targets(NUMBER, {"text": "a", "label": -1.5}) == [[-1.5]]
    assert labels(WORDS, {"tokens": ["a", "b"], "labels": ["green", None]}) == [1, None]


def test_names_that_are_numbers_are_names(tmp_path):
    years = LabelSpec(False, "single-label", ["1999", "2", "0"])
    assert [
        text.labels
        for text in read_labelled_texts(
            write_records(tmp_path, {"text": "a", "label": 0}, {"text": "a", "label": 1999}), years
        )
    ] == [[2], [0]]
    assert find_labels(
        write_records(tmp_path, *[{"text": "a", "label": label} for label in (10, 9, "b", "a")]),
        of_tokens=False,
        problem="single-label",
    ) == ["9", "10", "a", "b"]


BAD = {
    "out of range": (
        SINGLE,
        {"text": "a", "label": 3},
        "the label 3 is out of range; there are 3 classes, 0 to 2",
    ),
    "negative": (SINGLE, {"text": "a", "label": -1}, "the label -1 is out of range"),
    "unknown": (
        SINGLE,
        {"text": "a", "label": "bleu"},
        'the label "bleu" is not in classification.labels; did you mean `blue`?',
    ),
    "missing": (SINGLE, {"text": "a"}, 'the field "label" is missing'),
    "null": (SINGLE, {"text": "a", "label": None}, 'the field "label" is missing'),
    "true": (SINGLE, {"text": "a", "label": True}, "the label true is not in"),
    "a list for one": (SINGLE, {"text": "a", "label": ["red"]}, 'the label ["red"] is not in'),
    "no text": (SINGLE, {"label": 1}, 'no text in the field "text"'),
    "blank text": (SINGLE, {"text": " \n", "label": 1}, 'no text in the field "text"'),
    "one for a list": (
        MULTI,
        {"text": "a", "labels": "red"},
        'the field "labels" is not a list of classes',
    ),
    "no list": (MULTI, {"text": "a", "label": "red"}, 'the field "labels" is missing'),
    "one of a list": (MULTI, {"text": "a", "labels": ["red", "x"]}, 'the label "x" is not in'),
    "no number": (NUMBER, {"text": "a", "label": "1.5"}, 'the label "1.5" is not a number'),
    "beyond fp32": (NUMBER, {"text": "a", "label": 1e39}, "the label 1e+39 is not a number"),
    "not a finite number": (
        NUMBER,
        {"text": "a", "label": float("nan")},
        "the label NaN is not a number",
    ),
    "fewer labels": (WORDS, {"tokens": ["a", "b"], "labels": [1]}, "2 tokens have 1 labels"),
    "no words": (
        WORDS,
        {"text": "a b", "labels": [1, 1]},
        'the field "tokens" is not a list of words',
    ),
    "no labels": (WORDS, {"tokens": ["a"]}, 'the field "labels" is missing, with a class for each'),
    "label of one word": (WORDS, {"tokens": ["a"], "labels": [7]}, "the label 7 is out of range"),
    "no object": (SINGLE, ["a", 1], "not a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, name):
    reading, record, sentence = BAD[name]
    good = (
        {"text": "a", "label": 0, "labels": []}
        if not reading.of_tokens
        else {"tokens": ["a"], "labels": [0]}
    )
    path = write_records(tmp_path, good, record)
    with pytest.raises(DataError) as error:
        read_labelled_texts(path, reading)
    assert str(error.value).startswith(f"{path}, line 2: {sentence}")


def test_files_that_hold_no_labels(tmp_path):
    (tmp_path / "plain.txt").write_text("words")
    with pytest.raises(
        DataError, match=r"plain.txt is plain text; labels must be in JSONL or parquet"
    ):
        read_labelled_texts(str(tmp_path / "plain.txt"), SINGLE)
    with pytest.raises(DataError, match="contains no text with a label"):
        read_labelled_texts(write_records(tmp_path), SINGLE)


def samples(folder, texts, **more):
    settings = {"of_tokens": False, "sequence_length": 8, "padding": 0, "seed": 3, **more}
    return ClassificationDataset(texts, load_tokenizer(folder), **settings)


def test_a_texts_label_stands_at_the_last_token_that_is_not_padding(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = [
        "fox",
        "the quick brown fox jumps over the lazy dog over the lazy dog",
        "dog<|endoftext|>",
    ]  # the last ends with the padding
    made = samples(
        tokenizer_folder,
        [LabelledText(split_words(text), [number]) for number, text in enumerate(texts)],
    )
    seen = {}
    for position in range(3):
        sample = made.fetch(position)
        (place,) = np.flatnonzero(sample.labels >= 0)
        seen[int(sample.labels[place])] = int(place)
        tokens = tokenizer(texts[int(sample.labels[place])])["input_ids"][:8]
        assert sample.tokens.tolist() == tokens + [0] * (8 - len(tokens))
    assert made.num_truncated == 1
    assert seen == {
        0: len(tokenizer("fox")["input_ids"]) - 1,
        1: 7,
        2: len(tokenizer("dog")["input_ids"]) - 1,
    }
    assert last_token_index([0, 0], 0) == 0


def test_every_sample_once_an_epoch_and_padding_after_the_last(tokenizer_folder):
    made = samples(tokenizer_folder, [LabelledText([f"{number}"], [number]) for number in range(5)])
    for epoch in range(2):
        assert sorted(int(made.fetch(5 * epoch + i).labels.max()) for i in range(5)) == list(
            range(5)
        )
    made.limit = 5
    assert made.fetch(5).labels.max() == -100


def test_a_words_label_stands_at_its_first_token(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    words, labels = ["naïve", "fox", "jumps", "🙂", "zzz"], [1, None, 2, 0, 1]
    made = samples(
        tokenizer_folder,
        [LabelledText([f"{word} " for word in words], labels)],
        of_tokens=True,
        sequence_length=64,
    )
    sample = made.fetch(0)
    where = np.flatnonzero(sample.labels >= 0)
    assert sample.labels[where].tolist() == [1, 2, 0, 1]
    for place, number in zip(where, (0, 2, 3, 4), strict=True):
        assert tokenizer.decode(sample.tokens[:place]).rstrip() == " ".join(words[:number])
        assert tokenizer.decode(sample.tokens[place:]).lstrip().startswith(words[number])
    # a tokenizer whose offsets leave the space out, and one token that reaches over two words
    assert first_token_labels(
        LabelledText(["ab ", "c ", "d "], [1, 2, 0]), [(0, 1), (1, 2), (3, 4), (5, 6)]
    ) == [1, -100, 2, 0]
    assert first_token_labels(LabelledText(["ab ", "c "], [1, 2]), [(0, 4)]) == [1]


def test_targets_travel_beside_the_labels(tokenizer_folder):
    """More classes than an int64 has bits, and padding without a label after the last sample."""
    targets = [np.eye(100, dtype=np.float32)[number] for number in (0, 70, 99)]
    texts = [LabelledText(["fox"], [0], target) for target in targets]
    dataset = ClassificationDataset(
        texts,
        load_tokenizer(tokenizer_folder),
        of_tokens=False,
        sequence_length=8,
        padding=0,
        seed=3,
    )
    dataset.limit = 3
    loader = DataLoader(dataset, global_batch_size=4, micro_batch_size=4, data_rank=0, data_size=1)
    batch = loader.microbatches(0)[0]
    loader.close()
    assert batch.targets.shape == (4, 100)
    assert sorted(batch.targets.argmax(1)[:3].tolist()) == [0, 70, 99]
    assert (batch.labels >= 0).sum(1).tolist() == [1, 1, 1, 0]
    assert not batch.targets[3].any()


KEY = (1, 2)


def test_words_joined_are_the_text():
    text = "  two\n\twords  and more "
    assert "".join(split_words(text)) == text
    assert len(split_words(text)) == 4


@given(
    st.lists(st.text("abc", min_size=1), max_size=12),
    st.sampled_from(["delete", "swap", "mask", "mix"]),
    st.integers(0, 1 << 60),
)
def test_augmented_words_are_a_function_of_the_key(words, how, number):
    masked = ["[M]"] * len(words)
    first, second = (
        augment(words, how, share=0.5, key=(number, 1), masked=masked) for _ in range(2)
    )
    assert first == second
    assert bool(first) == bool(words)
    if how == "swap":
        assert sorted(first) == sorted(words)
    if how == "mask":
        assert all(after in (before, "[M]") for before, after in zip(words, first, strict=True))
    if how == "delete":
        left = iter(words)
        assert all(word in left for word in first), "a part, in order"


def test_impossible_augmentation_falls_back():
    words = ["a ", "b ", "c "]
    assert augment(words, "delete", share=0.999, key=KEY, masked=None) in (
        words,
        *[[word] for word in words],
        *[[a, b] for a in words for b in words],
    )
    assert augment(["a"], "delete", share=0.999, key=KEY, masked=None) == ["a"]
    assert augment(words, "mask", share=0.5, key=KEY, masked=None) == augment(
        words, "delete", share=0.5, key=KEY, masked=None
    )

    class Tokenizer:
        mask_token, unk_token = None, "[UNK]"

    assert mask_word(Tokenizer()) == "[UNK]"
    assert mask_word(object()) is None


def test_about_a_share_of_words_changes():
    words = [str(number) for number in range(4000)]
    for how in ("delete", "mask"):
        after = augment(words, how, share=0.2, key=KEY, masked=["[M]"] * len(words))
        assert 0.17 < 1 - sum(word != "[M]" for word in after) / len(words) < 0.23


def test_a_text_looks_different_each_epoch_and_keeps_its_label(tokenizer_folder):
    text = LabelledText(split_words("the quick brown fox jumps over the lazy dog"), [2])
    made = samples(
        tokenizer_folder, [text], sequence_length=64, augmentation="delete", augment_share=0.4
    )
    seen = [made.fetch(epoch) for epoch in range(6)]
    assert len({tuple(sample.tokens.tolist()) for sample in seen}) > 3
    assert all(sample.labels.max() == 2 for sample in seen)
    again = samples(
        tokenizer_folder, [text], sequence_length=64, augmentation="delete", augment_share=0.4
    )
    assert again.fetch(4).tokens.tolist() == seen[4].tokens.tolist()
