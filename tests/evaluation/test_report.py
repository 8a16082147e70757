"""What people see of an evaluation: lines while it runs, a table, and a hash that says what was measured."""

from __future__ import annotations

import hashlib
import json

import pytest

from megatrain.checkpoint import manifest
from megatrain.evaluation import hashes, progress
from megatrain.evaluation.run import table
from megatrain.evaluation.windows import Row

RESULTS = {
    "kind": "classification", "figures": {"accuracy": 0.75, "perplexity": 123456.7, "samples": 12345, "bits_per_byte": None},
    "classes": {"red": {"precision": 0.5, "support": 2.0}, "green-blue": {"precision": 1.0, "support": 10.0}},
    "model": {"path": "there", "model_type": "llama"}, "data": {"paths": ["a.jsonl", "b.jsonl"]},
    "settings": {"window": 64, "stride": 32, "tensor": 2, "pipeline": 1, "data": 1, "dtype": "bf16"}, "seconds": 61.0, "tokens_per_second": 1234.5,
}  # fmt: skip


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
    watched = progress.Progress(silent=silent)
    assert list(watched.watch([Row([1, 2], [2, 3]), Row([1], [2])])) == [Row([1, 2], [2, 3]), Row([1], [2])]
    assert (watched.rows, watched.tokens) == (2, 3)
    assert [line.split(" tokens")[0].strip() for line in said] == ([] if silent else ["1 rows, 2.00", "2 rows, 3.00"])


def test_a_checkpoints_hashes_are_those_of_its_manifest(tmp_path, monkeypatch):
    """Not read again where the manifest knows them; the same as of a copy without one."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("another file")
    plain = hashes.model_hash(tmp_path)
    records = [manifest.record(tmp_path, tmp_path / name)._asdict() for name in ("config.json", "model.safetensors", "tokenizer.json")]
    (tmp_path / manifest.MANIFEST).write_text(json.dumps({"format": manifest.FORMAT, "files": records}))
    monkeypatch.setattr(hashes, "file_hash", lambda path: pytest.fail(f"{path} was read"))
    assert hashes.model_hash(tmp_path) == plain
    lines = "".join(f"{name} {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}\n" for name in ("config.json", "model.safetensors"))
    assert plain == hashlib.sha256(lines.encode()).hexdigest()
