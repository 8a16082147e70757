"""Preparation of chat files: counts, long samples, reuse, and invalid records."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.chat_templates import CHATML, GEMMA, MISTRAL

from megatrain.data import chat_preprocess
from megatrain.data.chat_preprocess import (
    Counts,
    SFTSpec,
    fingerprint,
    make_encoder,
    prepare_data,
    read_counts,
)
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
def spec(tokenizer_folder, tmp_path):
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


def test_tokens_and_loss_masks_are_prepared(spec, chats, tmp_path):
    prefix = prepare_data(str(chats), spec, folder=tmp_path / "data", name="train0")
    template = ChatTemplate(spec.tokenizer, file=spec.chat_template)
    expected = template.tokenizer.apply_chat_template(RECORDS[1]["messages"]).input_ids
    second = contents(prefix)[1]
    assert [code >> 1 for code in second] == expected
    answer = [code >> 1 for code in second if code & 1]
    assert (
        template.tokenizer.decode(answer) == "the lazy dog " * 10 + "<|im_end|>\n"
    )  # not a special token, so the newline has a loss too
    counts = read_counts(prefix)
    assert counts == Counts(
        3,
        sum(map(len, contents(prefix))),
        sum(code & 1 for some in contents(prefix) for code in some),
    )


def test_files_of_all_kinds_hold_the_same(spec, chats, tmp_path):
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
    whole = contents(prepare_data(str(chats), spec, folder=tmp_path / "data", name="train0"))
    for name in ("z.jsonl.gz", "z.jsonl.zst", "z.parquet"):
        assert (
            contents(
                prepare_data(str(tmp_path / name), spec, folder=tmp_path / "data", name="train1")
            )
            == whole
        ), name


def test_long_samples_are_truncated_skipped_or_refused(spec, chats, tmp_path):
    def make(too_long):
        prefix = prepare_data(
            str(chats),
            spec._replace(sequence_length=96, too_long=too_long),
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
        match=r"chats.jsonl, line 2: takes \d+ places, but data.sequence_length=96; "
        r"data.too_long=truncate or skip",
    ):
        make("error")
    with pytest.raises(
        DataError,
        match=r"all 3 samples are longer than data.sequence_length=8; no tokens with a loss remain",
    ):
        prepare_data(
            str(chats), spec._replace(sequence_length=8), folder=tmp_path / "none", name="train0"
        )


def test_data_are_prepared_once_until_something_changes(spec, chats, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    prefix = prepare_data(str(chats), spec, folder=folder, name="train0")
    with monkeypatch.context() as context:
        context.setattr(chat_preprocess, "_prepare", None)
        assert prepare_data(str(chats), spec, folder=folder, name="train0") == prefix
    (folder / f"{prefix.name}.json").unlink()  # as after a kill before the end
    assert prepare_data(str(chats), spec, folder=folder, name="train0") == prefix
    for change in (spec._replace(train_on="all"), spec._replace(sequence_length=200)):
        assert prepare_data(str(chats), change, folder=folder, name="train0") != prefix
    assert prepare_data(str(chats), spec, folder=folder, name="train0") == prefix
    write(chats, RECORDS[:2])
    new = prepare_data(str(chats), spec, folder=folder, name="train0")
    assert len(contents(new)) == 2
    Path(spec.chat_template).write_text(CHATML.replace("\\n", "\\n\\n"))
    newest = prepare_data(str(chats), spec, folder=folder, name="train0")
    assert newest != new
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{newest.name}{suffix}" for suffix in (".bin", ".idx", ".json")
    ]


def test_spec_block_and_result_survive_pickling(spec, chats):
    encode = make_encoder(pickle.loads(pickle.dumps(spec)))
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
    "roles out of order: message 1 is the assistant's": (
        '{"messages": [{"role": "assistant", "content": "x"}]}'
    ),
    "message 2 is an empty assistant turn": '{"prompt": "x", "completion": ""}',
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_by_file_and_line(reason, spec, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + BAD[reason] + "\n" + "{\n")
    with pytest.raises(DataError) as error:
        prepare_data(str(path), spec, folder=tmp_path / "data", name="train0")
    assert str(error.value).startswith(f"{path}, line 2: {reason}")
    assert not list((tmp_path / "data").iterdir()), "no partial files remain"
    with pytest.raises(DataError) as error:
        list(preview_samples(str(path), spec, count=3, colour=False))
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
def test_sample_that_the_template_cannot_render(template, reason, spec, tmp_path):
    Path(spec.chat_template).write_text(template)
    path = write(tmp_path / "bad.jsonl", [{"system": "Be kind", **RECORDS[0]}])
    with pytest.raises(DataError) as error:
        prepare_data(str(path), spec, folder=tmp_path / "data", name="train0")
    assert str(error.value).startswith(f"{path}, line 1: {reason}")


def test_preview_highlights_tokens_with_a_loss(spec, chats):
    first, second = list(
        preview_samples(str(chats), spec._replace(sequence_length=60), count=2, colour=False)
    )
    assert first == (
        f"{chats}, line 1: 60 tokens, loss on 13 of them\n"
        "<|im_start|>user\nthe quick<|im_end|>\n<|im_start|>assistant\n«brown fox<|im_end|>\n»\n"
    )
    assert "longer than data.sequence_length=60, shown truncated (data.too_long=truncate)" in second
    (coloured,) = preview_samples(str(chats), spec, count=1, colour=True)
    assert "assistant\n\x1b[32;1mbrown fox<|im_end|>\n\x1b[0m" in coloured


def test_fingerprint_does_not_change(tmp_path, monkeypatch):
    """Runs of earlier versions find the chats that they prepared by this value."""
    monkeypatch.setattr(Path, "resolve", lambda self: Path("/chats.jsonl"))
    path = tmp_path / "chats.jsonl"
    path.write_text("{}\n")
    os.utime(path, ns=(1, 1))
    spec = SFTSpec("tokenizer", None, "assistant", "truncate", 512)
    assert fingerprint([path], spec) == "67392e43627165d8"
