"""Recognises a source by what is in its folder."""

from __future__ import annotations

from pathlib import Path

from megatrain.convert.folders import model_folder, open_folder
from megatrain.convert.source import Source
from megatrain.errors import CheckpointError


def open_source(path: Path, *, config: str | None) -> Source:
    """The source at the path, as the kind of folder it is; CheckpointError when it is none that is known."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    folder = model_folder(path)
    if (folder / "config.json").is_file():
        return open_folder(folder, hashes=True)
    raise CheckpointError(f"{path} is of no kind that is read: it holds no config.json")
