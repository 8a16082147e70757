"""What a checkpoint holds, without loading it: tensors, files, the layout that wrote it, and whether it is whole."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.checkpoint import manifest
from megatrain.checkpoint.train_state import train_state_path
from megatrain.conversion.detect_format import Hints, open_source
from megatrain.conversion.folders import HuggingFaceFolder, check_coverage, model_folder
from megatrain.conversion.sources import nbytes
from megatrain.errors import UserError
from megatrain.models.classification_config import any_architecture
from megatrain.models.counts import parameter_shapes


class TensorRow(NamedTuple):
    """A tensor, or the tensors of one name in all layers: `name` has their numbers then, as `0-31`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    times: int
    num_bytes: int
    files: list[str]


class InspectionReport(NamedTuple):
    """A checkpoint's description.

    Attributes:
        trainer: step, tokens, layout and the run's config, as a checkpoint of ours keeps them; None elsewhere.
        integrity: in words; `whole` says whether it is good.
    """

    folder: str
    kind: str
    model_type: str
    parameters: int
    num_bytes: int
    tensors: list[TensorRow]
    files: dict[str, int]
    trainer: dict[str, Any] | None
    conversion: dict[str, Any] | None
    config: dict[str, Any]
    integrity: str
    whole: bool


def inspect(path: Path, hints: Hints, *, hashes: bool) -> InspectionReport:
    """Look at a folder of any kind that is converted; `hashes` reads every byte of a checkpoint of ours."""
    folder = model_folder(path) if path.is_dir() else path
    problem = (
        manifest.find_problem(folder, hashes=hashes) if train_state_path(folder).is_file() else None
    )
    source = open_source(folder, hints, checked=False)
    architecture = any_architecture(source.config)
    expected = parameter_shapes(architecture)
    try:
        source.adopt(architecture, expected)
        check_coverage(source, architecture, expected)
    except UserError as error:
        problem = problem or str(error)
    names = source.names()
    file = source.file if isinstance(source, HuggingFaceFolder) else lambda name: source.folder
    rows = [
        TensorRow(
            name,
            source.shape(name),
            str(source.dtype(name)).removeprefix("torch."),
            1,
            nbytes(source, name),
            [file(name).name],
        )
        for name in names
    ]
    trainer = _read(train_state_path(folder))
    words = {
        True: "every file's hash is as written",
        False: "every file's size is as written (--hashes reads them through)",
    }[hashes]
    if trainer is None:
        words = "every tensor of the model is there in its shape, and no other"
    return InspectionReport(
        str(source.folder),
        source.kind,
        architecture.model_type,
        sum(math.prod(row.shape) for row in rows),
        sum(row.num_bytes for row in rows),
        rows,
        {
            str(p.relative_to(source.folder)): p.stat().st_size
            for p in sorted(source.folder.rglob("*"))
            if p.is_file()
        },
        trainer,
        _read(folder / "conversion.json"),
        source.config.to_dict(),
        problem or words,
        problem is None,
    )


def _read(path: Path) -> dict[str, Any] | None:
    return manifest.read_json(path) if path.is_file() else None


def collapsed(rows: list[TensorRow]) -> list[TensorRow]:
    """Tensors that differ in their layer's number alone, as one row each."""
    groups: dict[tuple[str, tuple[int, ...], str], list[TensorRow]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\.\d+\.", ".{}.", row.name), row.shape, row.dtype), []).append(
            row
        )
    return [_row(key[0], group) for key, group in groups.items()]


def _row(pattern: str, group: list[TensorRow]) -> TensorRow:
    numbers = sorted(int(match[1]) for row in group if (match := re.search(r"\.(\d+)\.", row.name)))
    files = sorted({file for row in group for file in row.files})
    return group[0]._replace(
        name=pattern.replace("{}", _spans(numbers)),
        times=len(group),
        num_bytes=sum(row.num_bytes for row in group),
        files=files,
    )


def _spans(numbers: list[int]) -> str:
    """0-3,5 of [0, 1, 2, 3, 5]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def describe(found: InspectionReport) -> Iterator[str]:
    """The lines for a reader."""
    yield f"{found.folder}: a {found.kind}"
    yield f"  model      {found.model_type}, {found.parameters:,} parameters, {found.num_bytes / 1e9:.3f} GB in {len(found.tensors)} tensors"
    trainer = found.trainer
    if trainer is not None:
        yield f"  run        step {trainer.get('step')}, {trainer.get('tokens', 0):,} tokens, {trainer.get('updates', 0):,} updates"
        layout = ", ".join(f"{name} {value}" for name, value in trainer.get("layout", {}).items())
        yield f"  layout     {layout or 'none: it was converted, no run has written it'}"
    if found.conversion is not None:
        yield f"  converted  from a {found.conversion.get('source_kind')}, {_proof(found.conversion.get('proof'))}"
    sizes = {
        "config": {
            name: value
            for name, value in found.config.items()
            if isinstance(value, int | float | str) and name in _SHOWN
        }
    }
    yield "  config     " + ", ".join(f"{name} {value}" for name, value in sizes["config"].items())
    yield f"  integrity  {found.integrity}"
    yield ""
    rows = collapsed(found.tensors)
    width = max(len(row.name) for row in rows)
    yield f"{'tensor':{width}}  {'shape':>16}  {'dtype':>9}  {'times':>5}  {'MB':>10}  file"
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        files = (
            row.files[0] if len(row.files) == 1 else f"{row.files[0]} and {len(row.files) - 1} more"
        )
        yield f"{row.name:{width}}  {shape:>16}  {row.dtype:>9}  {row.times:>5}  {row.num_bytes / 1e6:>10.3f}  {files}"
    yield ""
    yield f"{'file':{width}}  {'MB':>16}"
    for name, size in found.files.items():
        yield f"{name:{width}}  {size / 1e6:>16.3f}"


_SHOWN = (
    "vocab_size",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "n_positions",
    "tie_word_embeddings",
)


def _proof(proof: dict[str, Any] | None) -> str:
    return (
        "not proven (--no-verify)"
        if proof is None
        else f"logits within {proof['max_logit_difference']:.3g} of it"
    )


def as_json(found: InspectionReport) -> str:
    """Everything, each tensor a row of its own."""
    return json.dumps(
        {**found._asdict(), "tensors": [row._asdict() for row in found.tensors]},
        indent=1,
        default=str,
    )
