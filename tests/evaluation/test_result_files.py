"""What people see of an evaluation: lines while it runs, a table, and a hash that says what was measured."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest

from megatrain.checkpoint import manifest
from megatrain.errors import DataError
from megatrain.evaluation import fingerprint, progress
from megatrain.evaluation.run import table, write
from megatrain.evaluation.spec import EvalSpec, make_config, model_name
from megatrain.evaluation.texts import read_texts
from megatrain.evaluation.windows import Row

RESULTS = {
    "kind": "classification",
    "figures": {"accuracy": 0.75, "perplexity": 123456.7, "samples": 12345, "bits_per_byte": None},
    "classes": {
        "red": {"precision": 0.5, "support": 2.0},
        "green-blue": {"precision": 1.0, "support": 10.0},
    },
    "model": {"path": "there", "model_type": "llama"},
    "data": {"paths": ["a.jsonl", "b.jsonl"]},
    "settings": {
        "window": 64,
        "stride": 32,
        "tensor": 2,
        "pipeline": 1,
        "data": 1,
        "dtype": "bf16",
    },
    "seconds": 61.0,
    "tokens_per_second": 1234.5,
}


def test_the_table():
    assert table(RESULTS).splitlines() == [
        "classification of a.jsonl, b.jsonl",
        "  model     there (llama)",
        "  settings  window 64, stride 32, tensor 2 x pipeline 1 x data 1, bf16",
        "  time      1m01s, 1,234 tokens/s",
        "",
        "  accuracy              0.75000",
        "  perplexity         1.2346e+05",
        "  samples                12,345",
        "  bits_per_byte               -",
        "",
        "              precision    support",
        "  red            0.5000          2",
        "  green-blue     1.0000         10",
    ]


@pytest.mark.parametrize("silent", [False, True])
def test_lines_while_it_runs(monkeypatch, silent):
    said = []
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    monkeypatch.setattr(progress.logger, "info", said.append)
    watched = progress.ProgressBar(silent=silent)
    assert list(watched.watch([Row([1, 2], [2, 3]), Row([1], [2])])) == [
        Row([1, 2], [2, 3]),
        Row([1], [2]),
    ]
    assert (watched.rows, watched.tokens) == (2, 3)
    assert [line.split(" tokens")[0].strip() for line in said] == (
        [] if silent else ["1 rows, 2.00", "2 rows, 3.00"]
    )


def test_a_checkpoints_hashes_are_those_of_its_manifest(tmp_path, monkeypatch):
    """Not read again where the manifest knows them; the same as of a copy without one."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("another file")
    plain = fingerprint.model_hash(tmp_path)
    records = [
        manifest.make_record(tmp_path, tmp_path / name)._asdict()
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    (tmp_path / manifest.MANIFEST).write_text(
        json.dumps({"format": manifest.FORMAT, "files": records})
    )
    monkeypatch.setattr(fingerprint, "file_hash", lambda path: pytest.fail(f"{path} was read"))
    assert fingerprint.model_hash(tmp_path) == plain
    lines = "".join(
        f"{name} {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert plain == hashlib.sha256(lines.encode()).hexdigest()


def test_an_evaluation_of_something_else_has_another_file(tmp_path):
    """And the same again, from wherever, replaces its own."""
    subject = EvalSpec("there", ("a.jsonl",), "perplexity", 64, 32, "text")
    first: dict = {
        **RESULTS,
        "kind": "perplexity",
        "model": {"path": "there", "sha256": "1" * 64},
        "data": {"paths": ["a.jsonl"], "sha256": "2" * 64},
        "tokenizer": {"path": "there", "sha256": "3" * 64},
        "settings": {**RESULTS["settings"], "tokenizer": "there"},
    }
    path = write(first, tmp_path, subject)
    assert path.name.startswith("perplexity-a.jsonl-")
    again = copy.deepcopy({**first, "figures": {"loss": 1.0}, "seconds": 2.0})
    again["model"]["path"] = again["tokenizer"]["path"] = again["settings"]["tokenizer"] = "/moved"
    assert write(again, tmp_path, subject) == path
    others = []
    for part, name in (
        ("model", "sha256"),
        ("data", "sha256"),
        ("tokenizer", "sha256"),
        ("settings", "window"),
        ("settings", "dtype"),
    ):
        other = copy.deepcopy(first)
        other[part][name] = "other"
        others.append(write(other, tmp_path, subject))
    tasks = [
        {**first, "kind": "harness", "data": {"paths": [name], "sha256": None}}
        for name in ("one", "two")
    ]
    others += [
        write(results, tmp_path, subject._replace(kind="harness", tasks=("one",)))
        for results in tasks
    ]
    assert len({path, *others}) == 8
    assert json.loads(path.read_text()) == again


def test_the_folder_of_results_tells_models_apart(tmp_path):
    folders = [
        tmp_path / name
        for name in ("one/checkpoints/step-00000002", "two/checkpoints/step-00000002", "model")
    ]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "llama"}')
    assert [model_name(folder) for folder in folders] == [
        "one-step-00000002",
        "two-step-00000002",
        "model",
    ]
    assert make_config(folders[0], []).run.output_dir == "runs/evaluate/one-step-00000002"


def test_a_line_without_the_field_says_what_it_has(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [], "id": 1}\n')
    with pytest.raises(
        DataError,
        match=r'chats.jsonl, line 1: no field "text"; it has messages, id, and --field says which of them is the text',
    ):
        list(
            read_texts(
                [str(file)],
                tokenizer=lambda *args, **more: {"input_ids": []},
                prefix=None,
                field="text",
                vocab_size=9,
            )
        )
    file.write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r'line 1: field "text" is not a string$'):
        list(
            read_texts(
                [str(file)],
                tokenizer=lambda *args, **more: {"input_ids": []},
                prefix=None,
                field="text",
                vocab_size=9,
            )
        )
