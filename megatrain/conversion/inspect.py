"""Descriptions of checkpoints without loading them: tensors, files, layout and integrity."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.checkpoint import manifest
from megatrain.checkpoint.retention import find_model_folder
from megatrain.checkpoint.train_state import train_state_path
from megatrain.conversion.convert import REPORT_FILE
from megatrain.conversion.detect_format import Hints, open_source
from megatrain.conversion.sources import HuggingFaceFolder, Source, check_coverage, nbytes
from megatrain.errors import UserError
from megatrain.models.classification_config import any_architecture
from megatrain.models.counts import parameter_shapes


class TensorRow(NamedTuple):
    """A tensor, or tensors that differ in the layer: `name` then has the layers, such as `0-31`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    times: int
    num_bytes: int
    files: list[str]


class InspectionReport(NamedTuple):
    """The description of a checkpoint, as `megatrain inspect --json` prints it.

    Attributes:
        trainer: step, tokens, layout and config of the run that wrote it; None for other formats.
        conversion: the content of conversion.json; None if the folder was not converted.
        integrity: the result of the check, for the user to read.
        whole: whether the checkpoint is complete.
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
    """Describes a folder of any format that can be converted.

    Args:
        path: a model's folder, or a run's folder for its best or newest checkpoint.
        hints: what the user adds to what the folder stores.
        hashes: compare the content of a megatrain checkpoint's files with its manifest, not only
            their sizes.

    Raises:
        CheckpointError: the format is unknown, or a file is too damaged to be described.
    """
    folder = find_model_folder(path) if path.is_dir() else path
    is_checkpoint = train_state_path(folder).is_file()
    problem = manifest.find_problem(folder, hashes=hashes) if is_checkpoint else None
    source = open_source(folder, hints, verify_hashes=False)
    architecture = any_architecture(source.config)
    expected = parameter_shapes(architecture)
    try:
        source.bind(architecture, expected)
        check_coverage(source, architecture, expected)
    except UserError as error:
        problem = problem or str(error)
    rows = [_tensor_row(source, name) for name in source.names()]
    return InspectionReport(
        folder=str(source.folder),
        kind=source.kind,
        model_type=architecture.model_type,
        parameters=sum(math.prod(row.shape) for row in rows),
        num_bytes=sum(row.num_bytes for row in rows),
        tensors=rows,
        files={
            str(path.relative_to(source.folder)): path.stat().st_size
            for path in sorted(source.folder.rglob("*"))
            if path.is_file()
        },
        trainer=_read_json(train_state_path(folder)),
        conversion=_read_json(folder / REPORT_FILE),
        config=source.config.to_dict(),
        integrity=problem or _describe_check(is_checkpoint=is_checkpoint, hashes=hashes),
        whole=problem is None,
    )


def _tensor_row(source: Source, name: str) -> TensorRow:
    file = source.file(name) if isinstance(source, HuggingFaceFolder) else source.folder
    dtype = str(source.dtype(name)).removeprefix("torch.")
    return TensorRow(name, source.shape(name), dtype, 1, nbytes(source, name), [file.name])


def _describe_check(*, is_checkpoint: bool, hashes: bool) -> str:
    if not is_checkpoint:
        return "complete: the tensors and shapes are those of the config"
    if hashes:
        return "complete: the hash of every file matches the manifest"
    return "complete: the size of every file matches the manifest (--hashes checks their content)"


def _read_json(path: Path) -> dict[str, Any] | None:
    return manifest.read_json(path) if path.is_file() else None


def group_layers(rows: list[TensorRow]) -> list[TensorRow]:
    """Returns one row for tensors that differ only in the number of their layer."""
    groups: dict[tuple[str, tuple[int, ...], str], list[TensorRow]] = {}
    for row in rows:
        pattern = re.sub(r"\.\d+\.", ".{}.", row.name)
        groups.setdefault((pattern, row.shape, row.dtype), []).append(row)
    return [_merge_rows(pattern, group) for (pattern, _, _), group in groups.items()]


def _merge_rows(pattern: str, rows: list[TensorRow]) -> TensorRow:
    layers = sorted(int(match[1]) for row in rows if (match := re.search(r"\.(\d+)\.", row.name)))
    return rows[0]._replace(
        name=pattern.replace("{}", _format_ranges(layers)),
        times=len(rows),
        num_bytes=sum(row.num_bytes for row in rows),
        files=sorted({file for row in rows for file in row.files}),
    )


def _format_ranges(numbers: list[int]) -> str:
    """Returns "0-3,5" for [0, 1, 2, 3, 5]."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges)


def format_report(report: InspectionReport) -> Iterator[str]:
    """Yields the lines of the report for the user."""
    yield f"{report.folder}: {report.kind}"
    yield (
        f"  model      {report.model_type}, {report.parameters:,} parameters, "
        f"{report.num_bytes / 1e9:.3f} GB in {len(report.tensors)} tensors"
    )
    state = report.trainer
    if state is not None:
        layout = ", ".join(f"{name} {value}" for name, value in state.get("layout", {}).items())
        yield (
            f"  run        step {state.get('step')}, {state.get('tokens', 0):,} tokens, "
            f"{state.get('updates', 0):,} updates"
        )
        yield f"  layout     {layout or 'none (converted, not written by a run)'}"
    if report.conversion is not None:
        verified = _format_verification(report.conversion.get("proof"))
        yield f"  converted  from {report.conversion.get('source_kind')}, {verified}"
    fields = {name: report.config[name] for name in _SHOWN_FIELDS if name in report.config}
    shown = {name: value for name, value in fields.items() if isinstance(value, int | float | str)}
    yield "  config     " + ", ".join(f"{name} {value}" for name, value in shown.items())
    yield f"  integrity  {report.integrity}"
    yield ""
    rows = group_layers(report.tensors)
    width = max(len(row.name) for row in rows)
    yield f"{'tensor':{width}}  {'shape':>16}  {'dtype':>9}  {'times':>5}  {'MB':>10}  file"
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        more = f" and {len(row.files) - 1} more" if len(row.files) > 1 else ""
        yield (
            f"{row.name:{width}}  {shape:>16}  {row.dtype:>9}  {row.times:>5}  "
            f"{row.num_bytes / 1e6:>10.3f}  {row.files[0]}{more}"
        )
    yield ""
    yield f"{'file':{width}}  {'MB':>16}"
    for name, size in report.files.items():
        yield f"{name:{width}}  {size / 1e6:>16.3f}"


_SHOWN_FIELDS = (
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
"""Fields of the config that the report shows."""


def _format_verification(verification: dict[str, Any] | None) -> str:
    if verification is None:
        return "not verified (--no-verify)"
    return f"logits differ by at most {verification['max_logit_difference']:.3g}"


def to_json(report: InspectionReport) -> str:
    """Returns the report as JSON, one row for each tensor."""
    tensors = [row._asdict() for row in report.tensors]
    return json.dumps({**report._asdict(), "tensors": tensors}, indent=1, default=str)
