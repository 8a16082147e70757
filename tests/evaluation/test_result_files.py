"""The output of an evaluation: progress, table, and the hash in the name of its file."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest

from megatrain import progress
from megatrain.checkpoint import manifest
from megatrain.errors import DataError
from megatrain.evaluation import fingerprint, rank
from megatrain.evaluation.perplexity import read_documents
from megatrain.evaluation.results import format_results, write_results
from megatrain.evaluation.spec import EvalSpec, make_config, model_name

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


def test_table():
    assert format_results(RESULTS).splitlines() == [
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


@pytest.mark.parametrize("as_json", [False, True])
def test_progress_is_logged_except_for_json(monkeypatch, as_json):
    lines = []
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(rank.logger, "info", lines.append)
    spec = EvalSpec("model", ("a",), "perplexity", 8, 8, "text", as_json=as_json)
    with rank._progress(0, spec) as bar:
        bar.update(1200)
        bar.update(300)
    found = [line.split(" tokens")[0].strip() for line in lines]
    assert found[1:3] == ([] if as_json else ["evaluating: 1.20k", "evaluating: 1.50k"])


def test_hashes_of_a_manifest_are_used(tmp_path, monkeypatch):
    """The hash equals that of a copy without a manifest."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("another file")
    plain = fingerprint.hash_model(tmp_path)
    records = [
        manifest.make_record(tmp_path, tmp_path / name)._asdict()
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    (tmp_path / manifest.MANIFEST).write_text(
        json.dumps({"format": manifest.FORMAT, "files": records})
    )
    monkeypatch.setattr(fingerprint, "hash_file", lambda path: pytest.fail(f"{path} was read"))
    assert fingerprint.hash_model(tmp_path) == plain
    lines = "".join(
        f"{name} {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert plain == hashlib.sha256(lines.encode()).hexdigest()


def test_another_evaluation_has_another_file(tmp_path):
    """The same evaluation overwrites its file, whatever the paths."""
    subject = EvalSpec("there", ("a.jsonl",), "perplexity", 64, 32, "text")
    first: dict = {
        **RESULTS,
        "kind": "perplexity",
        "model": {"path": "there", "sha256": "1" * 64},
        "data": {"paths": ["a.jsonl"], "sha256": "2" * 64},
        "tokenizer": {"path": "there", "sha256": "3" * 64},
        "settings": {**RESULTS["settings"], "tokenizer": "there"},
    }
    path = write_results(first, tmp_path, subject)
    assert path.name.startswith("perplexity-a.jsonl-")
    again = copy.deepcopy({**first, "figures": {"loss": 1.0}, "seconds": 2.0})
    again["model"]["path"] = again["tokenizer"]["path"] = again["settings"]["tokenizer"] = "/moved"
    assert write_results(again, tmp_path, subject) == path
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
        others.append(write_results(other, tmp_path, subject))
    tasks = [
        {**first, "kind": "harness", "data": {"paths": [name], "sha256": None}}
        for name in ("one", "two")
    ]
    others += [
        write_results(results, tmp_path, subject._replace(kind="harness", tasks=("one",)))
        for results in tasks
    ]
    assert len({path, *others}) == 8
    assert json.loads(path.read_text()) == again


def test_folder_of_results_identifies_the_model(tmp_path):
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


def test_missing_field_lists_the_others(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [], "id": 1}\n')
    with pytest.raises(
        DataError,
        match=r'chats.jsonl, line 1: no field "text"; it has messages, id: '
        "name the field of the text with --field",
    ):
        list(
            read_documents(
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
            read_documents(
                [str(file)],
                tokenizer=lambda *args, **more: {"input_ids": []},
                prefix=None,
                field="text",
                vocab_size=9,
            )
        )
