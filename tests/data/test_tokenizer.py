"""Training a tokenizer, and loading it as transformers does."""

from __future__ import annotations

import argparse
import json

import pytest

from megatrain.cli import train_tokenizer as tokenizer_command
from megatrain.cli.main import main
from megatrain.data.tokenizer import (
    END_OF_TEXT,
    end_of_document_id,
    load_tokenizer,
    train_tokenizer,
)
from megatrain.errors import ConfigError, DataError


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"some words and number {i} " * 5}) + "\n" for i in range(50))
    )
    return path


@pytest.mark.parametrize(
    "text", ["tab\t and\r\n\n  spaces ", "naïve café 你好 🙂", "\x00\x7f", " 'quoted' , . !"]
)
def test_any_text_comes_back_as_it_was(tokenizer_folder, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_end_of_a_document_is_one_token_and_nothing_pads(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.convert_ids_to_tokens(end_of_document_id(tokenizer)) == END_OF_TEXT
    assert tokenizer(END_OF_TEXT).input_ids == [end_of_document_id(tokenizer)]
    assert tokenizer.pad_token is None


def test_further_special_tokens_are_never_split(corpus, tmp_path):
    made = train_tokenizer(
        [corpus], vocab_size=300, output=tmp_path / "t", special_tokens=["<|im_start|>"]
    )
    assert made.documents == 50
    assert len(load_tokenizer(made.folder)("<|im_start|>").input_ids) == 1


def test_the_vocabulary_has_the_size_asked_for_where_the_text_allows(corpus, tmp_path):
    assert train_tokenizer([corpus], vocab_size=257, output=tmp_path / "bytes").vocab_size == 257
    assert len(load_tokenizer(tmp_path / "bytes")) == 257
    assert (
        257 < train_tokenizer([corpus], vocab_size=5000, output=tmp_path / "all").vocab_size < 5000
    )


def test_a_vocabulary_too_small_for_bytes(corpus, tmp_path):
    with pytest.raises(ConfigError, match="--vocab-size=256 must be at least 257: 256 bytes and"):
        train_tokenizer([corpus], vocab_size=256, output=tmp_path / "t")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"vocab_size": 2**31}, "--vocab-size=2147483648 must be at most"),
        ({"special_tokens": [""]}, "--special-token='' must not be empty"),
    ],
)
def test_invalid_options_are_refused(corpus, tmp_path, more, words):
    with pytest.raises(ConfigError, match=words):
        train_tokenizer([corpus], output=tmp_path / "t", **{"vocab_size": 300, **more})


def test_inputs_without_documents_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty.jsonl: there are no documents to train on"):
        train_tokenizer([tmp_path / "empty.jsonl"], vocab_size=300, output=tmp_path / "t")


@pytest.mark.parametrize("output", ["file", "file/t"])
def test_output_that_cannot_be_written_is_reported_before_training(tmp_path, output):
    (tmp_path / "file").touch()
    (tmp_path / "bad.jsonl").write_text("training would stop here\n")
    with pytest.raises(DataError, match=r"file.* cannot be written: "):
        train_tokenizer([tmp_path / "bad.jsonl"], vocab_size=300, output=tmp_path / output)


def test_a_bad_line_stops_training(corpus, tmp_path):
    corpus.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DataError, match=r'text.jsonl, line 2: no field "text"'):
        train_tokenizer([corpus], vocab_size=300, output=tmp_path / "t")


def test_a_tokenizer_that_cannot_be_loaded(tmp_path):
    with pytest.raises(DataError, match="does not exist; give the folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(
        DataError, match=r"is not the folder of a tokenizer: it has no tokenizer.json"
    ):
        load_tokenizer(tmp_path)
    for damaged in ("{", "[]", '{"model": 5}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(
            DataError, match=r"contains a tokenizer that transformers cannot load \([^\n]+\)$"
        ):
            load_tokenizer(tmp_path)


def test_command_prints_the_result(corpus, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    tokenizer_command.add_arguments(parser)
    arguments = [str(corpus), "--vocab-size", "5000", "--output", str(tmp_path / "t")]
    assert tokenizer_command.run(parser.parse_args(arguments)) == 0
    printed = capsys.readouterr().out
    assert "tokens from 50 documents" in printed
    assert "--vocab-size 5000 was not reached" in printed


@pytest.mark.parametrize("command", ["train-tokenizer", "tokenizer"])
def test_command_and_its_old_name(command, corpus, tmp_path, capsys):
    folder = tmp_path / command
    assert main([command, str(corpus), "--vocab-size", "300", "--output", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}: a vocabulary of 300 tokens")


def test_help_names_the_new_command_only(capsys):
    assert main([]) == 2
    assert [
        line.split()[0] for line in capsys.readouterr().err.splitlines() if "tokenizer" in line
    ] == ["train-tokenizer"]
