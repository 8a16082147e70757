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
from megatrain.errors import ConfigError, RankError, UserError, format_override
from megatrain.evaluation.spec import EvalSpec, Kind, make_config, model_folder, trained_length
from megatrain.launch.local import run_local
from megatrain.launch.worker import start_rank


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
        kind: "perplexity", "choices", "classification", or "harness" for tasks.
        metrics: the metrics by name.
        path: the results file; None on other ranks than 0 of a launcher.
        content: the content of the results file.
    """

    kind: str
    metrics: dict[str, Any]
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
    overrides: Mapping[str, Any] | Sequence[str] = (),
    as_json: bool = False,
) -> EvalResult:
    """Evaluates a model, writes the results file and prints it as a table.

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
        overrides: settings such as `{"parallel.tensor": 2}` or `["parallel.tensor=2"]`.
        as_json: print the results file as JSON instead of a table.

    Returns:
        The metrics and the path of the results file.

    Raises:
        ConfigError: a setting is invalid, or does not fit the model.
        CheckpointError: the model is damaged or incomplete.
        DataError: a file is missing or has another format.
        RankError: a rank failed; the cause was printed.
    """
    paths = tuple(map(str, [data] if isinstance(data, str | Path) else data))
    _check_inputs(
        paths, tasks, {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot}
    )
    if isinstance(overrides, Mapping):
        overrides = [format_override(name, value) for name, value in overrides.items()]
    folder = model_folder(str(model))
    config = make_config(folder, overrides)
    device.set_environment(_local_size(config))
    # Imports torch, so it comes after the environment is set.
    from megatrain.evaluation import checks

    architecture = checks.check_model(config)
    window, stride = checks.make_windows(
        architecture, window=window, stride=stride, trained=trained_length(folder)
    )
    kind = "harness" if tasks else checks.choose_kind(kind, paths, architecture)
    spec = EvalSpec(
        str(folder),
        paths,
        kind,
        window,
        stride,
        field,
        as_json,
        tuple(tasks),
        include_path,
        limit,
        num_fewshot,
    )
    return _run_ranks(config, spec)


def _run_ranks(config: Config, spec: EvalSpec) -> EvalResult:
    """Evaluates on the ranks of a launcher, or on local ones."""
    from megatrain.evaluation.rank import evaluate_rank

    env = from_environment(os.environ)
    with tempfile.TemporaryDirectory(prefix="megatrain-evaluate-") as folder:
        target = functools.partial(evaluate_rank, spec=spec, output=Path(folder))
        if env is not None:
            code = start_rank(target, config, env)
        else:
            code = run_local(target, config, world_size=_local_size(config))
        if code:
            raise RankError(code)
        content = json.loads(Path(folder, f"{env.rank if env else 0}.json").read_text("utf-8"))
    path = content.pop("path", None)
    return EvalResult(
        kind=content["kind"],
        metrics=content["figures"],
        path=None if path is None else Path(path),
        content=content,
    )


def _local_size(config: Config) -> int:
    """Returns the number of ranks on this machine."""
    env = from_environment(os.environ)
    return env.local_size if env else config.local_world_size


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
