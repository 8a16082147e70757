"""Chat files to prepared data: counts, what is too long, made once, and a bad record by file and line."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.chat_templates import CHATML, GEMMA, MISTRAL

from megatrain.data import chat_preprocess
from megatrain.data.chat_preprocess import Counts, SFTSpec, make_encoder, prepare_data, read_counts
from megatrain.data.chat_template import ChatTemplate
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preview import preview_samples
from megatrain.data.text_files import read_blocks
from megatrain.errors import DataError

RECORDS = [
    {"prompt": "the quick", "completion": "brown fox"},
    {
        "messages": [
            {"role": "user", "content": "over"},
            {"role": "assistant", "content": "the lazy dog " * 10},
        ]
    },
    {"instruction": "jumps " * 40, "output": "over"},
]


@pytest.fixture
def recipe(tokenizer_folder, tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    return SFTSpec(
        str(tokenizer_folder), str(tmp_path / "chatml.jinja"), "assistant", "truncate", 512
    )


@pytest.fixture
def chats(tmp_path):
    return write(tmp_path / "chats.jsonl", RECORDS)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def contents(prefix):
    data = IndexedDataset(prefix)
    return [data.document(number).tolist() for number in range(data.num_documents)]


def test_tokens_and_what_is_learnt_of_them_are_prepared(recipe, chats, tmp_path):
    prefix = prepare_data(str(chats), recipe, folder=tmp_path / "data", name="train0")
    template = ChatTemplate(recipe.tokenizer, file=recipe.chat_template)
    expected = template.tokenizer.apply_chat_template(RECORDS[1]["messages"]).input_ids
    second = contents(prefix)[1]
    assert [code >> 1 for code in second] == expected
    answer = [code >> 1 for code in second if code & 1]
    assert (
        template.tokenizer.decode(answer) == "the lazy dog " * 10 + "<|im_end|>\n"
    )  # no special token: the newline belongs to it
    counts = read_counts(prefix)
    assert counts == Counts(
        3,
        sum(map(len, contents(prefix))),
        sum(code & 1 for some in contents(prefix) for code in some),
    )


def test_files_of_all_kinds_hold_the_same(recipe, chats, tmp_path):
    with gzip.open(tmp_path / "z.jsonl.gz", "wb") as file:
        file.write(chats.read_bytes())
    with pa.CompressedOutputStream(str(tmp_path / "z.jsonl.zst"), "zstd") as file:
        file.write(chats.read_bytes())
    pq.write_table(
        pa.Table.from_pylist(
            [
                {
                    "prompt": None,
                    "completion": None,
                    "messages": None,
                    "instruction": None,
                    "output": None,
                    **record,
                }
                for record in RECORDS
            ]
        ),
        tmp_path / "z.parquet",
    )
    whole = contents(prepare_data(str(chats), recipe, folder=tmp_path / "data", name="train0"))
    for name in ("z.jsonl.gz", "z.jsonl.zst", "z.parquet"):
        assert (
            contents(
                prepare_data(str(tmp_path / name), recipe, folder=tmp_path / "data", name="train1")
            )
            == whole
        ), name


def test_what_is_too_long_is_cut_left_out_or_refused(recipe, chats, tmp_path):
    def make(too_long):
        prefix = prepare_data(
            str(chats),
            recipe._replace(sequence_length=96, too_long=too_long),
            folder=tmp_path / too_long,
            name="train0",
        )
        return read_counts(prefix), [len(some) for some in contents(prefix)]

    counts, lengths = make("truncate")
    assert (counts.samples, counts.cut, counts.emptied, counts.skipped) == (
        2,
        1,
        1,
        0,
    )  # the third's answer lies beyond the cut
    assert lengths[1] == 97
    counts, lengths = make("skip")
    assert (counts.samples, counts.cut, counts.emptied, counts.skipped) == (1, 0, 0, 2)
    assert len(lengths) == 1
    with pytest.raises(
        DataError,
        match=r"chats.jsonl, line 2: takes \d+ places, but data.sequence_length=96; data.too_long=truncate or skip",
    ):
        make("error")
    with pytest.raises(
        DataError,
        match=r"all 3 samples are longer than data.sequence_length=8; no tokens with a loss remain",
    ):
        prepare_data(
            str(chats), recipe._replace(sequence_length=8), folder=tmp_path / "none", name="train0"
        )


def test_made_once_until_something_changes(recipe, chats, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    prefix = prepare_data(str(chats), recipe, folder=folder, name="train0")
    with monkeypatch.context() as nothing:
        nothing.setattr(chat_preprocess, "_prepare", None)
        assert prepare_data(str(chats), recipe, folder=folder, name="train0") == prefix
    (folder / f"{prefix.name}.json").unlink()  # as when it was killed before the end
    assert prepare_data(str(chats), recipe, folder=folder, name="train0") == prefix
    for change in (recipe._replace(train_on="all"), recipe._replace(sequence_length=200)):
        assert prepare_data(str(chats), change, folder=folder, name="train0") != prefix
    assert prepare_data(str(chats), recipe, folder=folder, name="train0") == prefix
    write(chats, RECORDS[:2])
    new = prepare_data(str(chats), recipe, folder=folder, name="train0")
    assert len(contents(new)) == 2
    Path(recipe.chat_template).write_text(CHATML.replace("\\n", "\\n\\n"))
    newest = prepare_data(str(chats), recipe, folder=folder, name="train0")
    assert newest != new
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{newest.name}{suffix}" for suffix in (".bin", ".idx", ".json")
    ]


def test_what_goes_to_a_process_and_back_is_whole(recipe, chats):
    encode = make_encoder(pickle.loads(pickle.dumps(recipe)))
    (block,) = read_blocks([chats], field=None)
    encoded = encode(pickle.loads(pickle.dumps(block)))
    back = pickle.loads(pickle.dumps(encoded))
    assert (back.codes.tolist(), back.lengths, back.counts) == (
        encoded.codes.tolist(),
        encoded.lengths,
        encoded.counts,
    )


BAD = {
    "not valid JSON": '{"messages": [',
    "not a JSON object": "[]",
    "empty line": "",
    "missing fields: it has text; required": '{"text": "x"}',
    "roles out of order: message 1 is the assistant's": '{"messages": [{"role": "assistant", "content": "x"}]}',
    "message 2 is an empty assistant turn": '{"prompt": "x", "completion": ""}',
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_by_file_and_line(reason, recipe, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + BAD[reason] + "\n" + "{\n")
    with pytest.raises(DataError) as error:
        prepare_data(str(path), recipe, folder=tmp_path / "data", name="train0")
    assert str(error.value).startswith(f"{path}, line 2: {reason}")
    assert not list((tmp_path / "data").iterdir()), "nothing half made is left"
    with pytest.raises(DataError) as error:
        list(preview_samples(str(path), recipe, count=3, colour=False))
    assert str(error.value).startswith(f"{path}, line 2: {reason}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (GEMMA, "the chat template fails: System role not supported"),
        (MISTRAL, "the chat template fails: Conversation roles must alternate"),
        (
            "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
            "no token has a loss",
        ),
    ],
)
def test_a_sample_that_the_template_makes_nothing_of(template, reason, recipe, tmp_path):
    Path(recipe.chat_template).write_text(template)
    path = write(tmp_path / "bad.jsonl", [{"system": "Be kind", **RECORDS[0]}])
    with pytest.raises(DataError) as error:
        prepare_data(str(path), recipe, folder=tmp_path / "data", name="train0")
    assert str(error.value).startswith(f"{path}, line 1: {reason}")


def test_samples_are_shown_with_what_is_learnt_marked(recipe, chats):
    first, second = list(
        preview_samples(str(chats), recipe._replace(sequence_length=60), count=2, colour=False)
    )
    assert first == (
        f"{chats}, line 1: 60 tokens, loss on 13 of them\n"
        "<|im_start|>user\nthe quick<|im_end|>\n<|im_start|>assistant\n«brown fox<|im_end|>\n»\n"
    )
    assert "longer than data.sequence_length=60, shown truncated (data.too_long=truncate)" in second
    (coloured,) = preview_samples(str(chats), recipe, count=1, colour=True)
    assert "assistant\n\x1b[32;1mbrown fox<|im_end|>\n\x1b[0m" in coloured
