"""An evaluation from settings to its results file, on every rank."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatrain import __version__
from megatrain.config.loader import Config
from megatrain.distributed import device as device_module
from megatrain.distributed.activity import RankActivity
from megatrain.distributed.env import RankEnv
from megatrain.distributed.mesh import make_mesh
from megatrain.evaluation import fingerprint, measure
from megatrain.evaluation.loglikelihood import Scorer
from megatrain.evaluation.measure import EvalResult
from megatrain.evaluation.model import open_scorer, open_tokenizer, prefix_token
from megatrain.evaluation.progress import ProgressBar
from megatrain.evaluation.spec import EvalSpec, describe_settings
from megatrain.models.classification_config import any_architecture
from megatrain.models.config import TransformerConfig, load_hf_config
from megatrain.telemetry.console import duration
from megatrain.telemetry.plots import plot_confusion_matrix

logger = logging.getLogger("megatrain")

Results = dict[str, Any]
"""What the results file holds; see `docs/evaluate.md`."""


def evaluate(
    config: Config, place: RankEnv, activity: RankActivity | None = None, *, subject: EvalSpec
) -> Results:
    """Measure on this rank together with all others; rank 0 writes and prints. All return the same figures, but for the harness's."""
    architecture = any_architecture(load_hf_config(config.model))
    data_size = config.data_size(place.world_size)
    device = device_module.select_device(place)
    mesh = make_mesh(
        place.rank,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        data=data_size,
        activity=activity,
    )
    mesh.activity.set_phase("evaluating")
    folder = Path(subject.model)
    tokenizer = open_tokenizer(config, architecture)
    prefix = prefix_token(tokenizer, architecture)
    scorer = open_scorer(folder, config, architecture, mesh, device)
    progress = ProgressBar(silent=subject.as_json)
    with ThreadPoolExecutor(max_workers=1) as thread:
        # Beside the evaluation, on the rank that writes them down.
        hashing = (
            thread.submit(_hashes, subject, config.data.tokenizer) if place.rank == 0 else None
        )
        measured = _measure(subject, scorer, tokenizer, prefix, architecture, progress)
        hashed = hashing.result() if hashing is not None else {}
    results = {
        "kind": subject.kind,
        "figures": _plain(measured.figures),
        "classes": measured.classes,
        "model": {
            "path": subject.model,
            "sha256": hashed.get("model"),
            "model_type": architecture.model_type,
        },
        "tokenizer": {"path": config.data.tokenizer, "sha256": hashed.get("tokenizer")},
        "data": {"paths": [*subject.data, *subject.tasks], "sha256": hashed.get("data")},
        "settings": describe_settings(subject, config, place.world_size),
        "versions": {"megatrain": __version__, "torch": torch.__version__},
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if place.rank == 0:
        path = write(results, Path(config.run.output_dir), subject)
        if measured.confusion is not None:
            plot_confusion_matrix(
                path.with_suffix(".png"), measured.confusion, list(measured.classes)
            )
        logger.info(
            json.dumps(results, indent=1)
            if subject.as_json
            else f"{table(results)}\n\nwritten to {path}"
        )
    return results


def _measure(
    subject: EvalSpec,
    scorer: Scorer,
    tokenizer: Any,
    prefix: int | None,
    architecture: TransformerConfig,
    progress: ProgressBar,
) -> EvalResult:
    if subject.kind == "harness":
        from megatrain.evaluation.lm_eval import run_tasks

        return EvalResult(run_tasks(subject, scorer, tokenizer, prefix, progress), {}, None)
    if subject.kind == "choices":
        return EvalResult(
            measure.choices(subject, scorer, tokenizer, prefix, progress).figures(), {}, None
        )
    if subject.kind == "classification":
        return measure.classification(subject, scorer, tokenizer, architecture, progress)
    return EvalResult(
        measure.perplexity(
            subject, scorer, tokenizer, prefix, architecture.vocab_size, progress
        ).figures(),
        {},
        None,
    )


def _hashes(subject: EvalSpec, tokenizer: str | None) -> dict[str, str | None]:
    return {
        "model": fingerprint.model_hash(Path(subject.model)),
        "tokenizer": fingerprint.tokenizer_hash(tokenizer),
        "data": fingerprint.data_hash(subject.data) if subject.data else None,
    }


def write(results: Results, folder: Path, subject: EvalSpec) -> Path:
    """Write the results file, named after what was measured on what, whole or not at all.

    The same evaluation, made again, replaces its own file; one of another model, other data or other settings has another name.
    """
    name = re.sub(r"[^\w.-]+", "_", Path((*subject.tasks, *subject.data)[0]).name)
    path = folder / f"{subject.kind}-{name}-{fingerprint.identity(results)}.json"
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return new.replace(path)


def table(results: Results) -> str:
    """The figures for people."""
    settings, model = results["settings"], results["model"]
    layout = f"tensor {settings['tensor']} x pipeline {settings['pipeline']} x data {settings['data']}, {settings['dtype']}"
    lines = [
        f"{results['kind']} of {', '.join(results['data']['paths'])}",
        f"  model     {model['path']} ({model['model_type']})",
        f"  settings  window {settings['window']}, stride {settings['stride']}, {layout}",
        f"  time      {duration(results['seconds'])}, {results['tokens_per_second']:,.0f} tokens/s",
        "",
    ]
    width = max(len(name) for name in results["figures"])
    lines += [
        f"  {name:<{width}}  {_shown(value):>14}" for name, value in results["figures"].items()
    ]
    if results["classes"]:
        names = list(next(iter(results["classes"].values())))
        width = max(len(label) for label in results["classes"])
        lines += ["", "  " + " " * width + "".join(f"{name:>11}" for name in names)]
        lines += [
            f"  {label:<{width}}"
            + "".join(f"{row[name]:>11.{0 if name == 'support' else 4}f}" for name in names)
            for label, row in results["classes"].items()
        ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.5g}"
        if isinstance(value, float) and abs(value) >= 1000
        else (f"{value:.5f}" if isinstance(value, float) else str(value))
    )


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """As JSON knows them: what is not finite is null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }
