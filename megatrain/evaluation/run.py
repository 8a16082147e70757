"""Evaluates a model on local ranks, or on those that a launcher started."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatrain.config.loader import Config
from megatrain.distributed import device
from megatrain.distributed.env import from_environment
from megatrain.errors import ConfigError, UserError, format_override
from megatrain.evaluation.spec import EvalSpec, Kind, make_config, model_folder, trained_length
from megatrain.launch.local import run_local
from megatrain.launch.worker import start_rank


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
        kind: "perplexity", "choices", "classification", or "harness" for tasks.
        metrics: the metrics by name.
        classes: the metrics of each class of a classifier.
        path: the results file; None on other ranks than 0 of a launcher.
        content: the content of the results file.
    """

    kind: str
    metrics: dict[str, Any]
    classes: dict[str, dict[str, float]]
    path: Path | None
    content: dict[str, Any]


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    kind: Kind | None = None,
    window: int | None = None,
    stride: int | None = None,
    field: str = "text",
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> EvalResult:
    """Evaluates a model, writes the results file and prints a table.

    It runs on local ranks, one for each part of `parallel.tensor`, `pipeline` and `data`, or on the
    ranks of a launcher, which all call it.

    Args:
        model: a checkpoint, a Hugging Face folder, or a run's folder for its best checkpoint.
        data: text, JSONL or parquet files, or the prefixes of indexed datasets.
        kind: what to measure; by default it follows from the model and the data.
        window: tokens that the model sees at once; by default its positions, up to 2048.
        stride: tokens that each window after a document's first scores; by default 512.
        field: the field with the text, in JSONL and parquet files.
        tasks: tasks of lm-evaluation-harness, instead of data; requires megatrain[eval].
        include_path: a folder with tasks of your own.
        limit: documents of each task.
        num_fewshot: examples before each question of a task.
        overrides: settings such as `{"parallel.tensor": 2, "train.dtype": "bf16"}`.

    Returns:
        The metrics and the path of the results file.

    Raises:
        ConfigError: a setting is invalid, or does not fit the model.
        CheckpointError: the model is damaged or incomplete.
        DataError: a file is missing or has another format.
        UserError: a rank failed; the cause was printed.
    """
    paths = [data] if isinstance(data, str | Path) else data
    config, spec = prepare(
        str(model),
        [str(path) for path in paths],
        [format_override(name, value) for name, value in (overrides or {}).items()],
        kind=kind,
        window=window,
        stride=stride,
        field=field,
        tasks=tasks,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
    )
    with tempfile.TemporaryDirectory(prefix="megatrain-evaluate-") as folder:
        code = start(config, spec, output=Path(folder))
        env = from_environment(os.environ)
        file = Path(folder, f"{env.rank if env else 0}.json")
        if code or not file.exists():
            raise UserError(f"the evaluation failed with exit code {code}")
        content = json.loads(file.read_text(encoding="utf-8"))
    path = content.pop("path", None)
    return EvalResult(
        kind=content["kind"],
        metrics=content["figures"],
        classes=content["classes"],
        path=None if path is None else Path(path),
        content=content,
    )


def prepare(
    model: str,
    data: Sequence[str],
    overrides: Sequence[str],
    *,
    kind: Kind | None,
    window: int | None,
    stride: int | None,
    field: str,
    tasks: Sequence[str],
    include_path: str | None,
    limit: int | None,
    num_fewshot: int | None,
    as_json: bool = False,
) -> tuple[Config, EvalSpec]:
    """Returns the settings and the spec of an evaluation, validated without ranks."""
    harness = {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot}
    _check_inputs(data, tasks, harness)
    folder = model_folder(model)
    config = make_config(folder, overrides)
    device.set_environment(_local_size(config))
    # Imports torch, so it comes after the environment is set.
    from megatrain.evaluation import checks

    architecture = checks.check_model(config)
    window, stride = checks.make_windows(
        architecture, window=window, stride=stride, trained=trained_length(folder)
    )
    spec = EvalSpec(
        str(folder),
        tuple(data),
        "harness" if tasks else checks.choose_kind(kind, data, architecture),
        window,
        stride,
        field,
        as_json,
        tuple(tasks),
        include_path,
        limit,
        num_fewshot,
    )
    return config, spec


def start(config: Config, spec: EvalSpec, *, output: Path | None = None) -> int:
    """Runs an evaluation on the ranks of a launcher or on local ones; returns the exit code."""
    from megatrain.evaluation.rank import evaluate_rank

    target = functools.partial(evaluate_rank, spec=spec, output=output)
    env = from_environment(os.environ)
    if env is not None:
        return start_rank(target, config, env)
    return run_local(target, config, world_size=_local_size(config))


def _local_size(config: Config) -> int:
    """Returns the number of ranks on this machine."""
    env = from_environment(os.environ)
    return env.local_size if env else config.model_ranks * (config.parallel.data or 1)


def _check_inputs(data: Sequence[str], tasks: Sequence[str], harness: Mapping[str, Any]) -> None:
    if tasks and data:
        raise ConfigError(
            "--tasks",
            ",".join(tasks),
            f"requires no DATA, but {data[0]} is given",
            "leave one of them out",
        )
    if not tasks and not data:
        raise UserError("DATA (files, or an indexed dataset's prefix) or --tasks is required")
    if tasks and find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks",
            ",".join(tasks),
            "requires lm-evaluation-harness",
            command="pip install 'megatrain[eval]'",
        )
    for name, value in harness.items():
        if value is not None and not tasks:
            raise ConfigError(
                f"--{name.replace('_', '-')}", value, "requires --tasks", "give --tasks too"
            )
