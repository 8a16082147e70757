"""SHA-256 of what was evaluated: the model's files, the tokenizer, the data, and all settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatrain.checkpoint import manifest
from megatrain.data.text_files import find_inputs
from megatrain.evaluation.perplexity import is_indexed

_WEIGHTS = (".safetensors", ".bin")


def hash_model(folder: Path) -> str:
    """Returns a hash of the names and hashes of config.json and the weights.

    A manifest's hashes are used if the folder has one.
    """
    known: dict[str, str] = {}
    if manifest.find_problem(folder) is None:
        content = manifest.read_json(folder / manifest.MANIFEST)
        known = {entry["path"]: entry["sha256"] for entry in content["files"]}
    files = [
        path for path in folder.iterdir() if path.name == "config.json" or path.suffix in _WEIGHTS
    ]
    return _combine((path.name, known.get(path.name) or hash_file(path)) for path in files)


def hash_data(data: Sequence[str]) -> str:
    """Returns a hash of the names and hashes of all files; their folders do not matter."""
    files: list[Path] = []
    for path in data:
        if is_indexed(path):
            files += [Path(f"{path}.bin"), Path(f"{path}.idx")]
        else:
            files += find_inputs([path]).files
    return _combine((path.name, hash_file(path)) for path in files)


def hash_tokenizer(folder: str | None) -> str | None:
    """Returns the hash of tokenizer.json; None if the folder is None or has no such file."""
    file = Path(folder or "", "tokenizer.json")
    return hash_file(file) if folder is not None and file.is_file() else None


def result_id(results: dict[str, Any]) -> str:
    """Returns eight hex digits over kind, model, tokenizer, data and settings, but no path."""
    settings = {name: value for name, value in results["settings"].items() if name != "tokenizer"}
    hashes = [results[part]["sha256"] for part in ("model", "tokenizer", "data")]
    tasks = [] if results["data"]["sha256"] else results["data"]["paths"]
    content = json.dumps([results["kind"], hashes, tasks, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _combine(hashes: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(hashes):
        digest.update(f"{name} {value}\n".encode())
    return digest.hexdigest()
