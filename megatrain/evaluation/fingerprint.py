"""What exactly was evaluated: one SHA-256 over a model's files, one over the data's, and one over all that figures follow from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatrain.checkpoint import manifest
from megatrain.data.text_files import find_inputs
from megatrain.evaluation.texts import is_indexed

_WEIGHTS = (".safetensors", ".bin")


def model_hash(folder: Path) -> str:
    """Over the names and hashes of config.json and the weights; those that a checkpoint's manifest knows are not read again."""
    known: dict[str, str] = {}
    if manifest.find_problem(folder) is None:
        known = {
            entry["path"]: entry["sha256"]
            for entry in manifest.read_json(folder / manifest.MANIFEST)["files"]
        }
    files = [
        path for path in folder.iterdir() if path.name == "config.json" or path.suffix in _WEIGHTS
    ]
    return _combined((path.name, known.get(path.name) or file_hash(path)) for path in files)


def data_hash(data: Sequence[str]) -> str:
    """Over the hashes of all files, in order of their names; the folder they are in does not count."""
    files: list[Path] = []
    for given in data:
        files += (
            [Path(f"{given}.bin"), Path(f"{given}.idx")]
            if is_indexed(given)
            else find_inputs([given]).files
        )
    return _combined((path.name, file_hash(path)) for path in files)


def tokenizer_hash(folder: str | None) -> str | None:
    """Of its tokenizer.json, without which none is used."""
    file = Path(folder or "", "tokenizer.json")
    return file_hash(file) if folder is not None and file.is_file() else None


def identity(results: dict[str, Any]) -> str:
    """Eight digits that follow from what was measured on what and how, and from no path: no two evaluations share a file by chance."""
    settings = {name: value for name, value in results["settings"].items() if name != "tokenizer"}
    hashes = [results[part]["sha256"] for part in ("model", "tokenizer", "data")]
    tasks = [] if results["data"]["sha256"] else results["data"]["paths"]
    return hashlib.sha256(
        json.dumps([results["kind"], hashes, tasks, settings], sort_keys=True).encode()
    ).hexdigest()[:8]


def file_hash(path: Path) -> str:
    """SHA-256 of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _combined(hashes: Iterable[tuple[str, str]]) -> str:
    digest: Any = hashlib.sha256()
    for name, value in sorted(hashes):
        digest.update(f"{name} {value}\n".encode())
    return str(digest.hexdigest())
