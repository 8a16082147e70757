"""An evaluation on one rank, from its spec to the results."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatrain.checkpoint.init_from_hf import Pretrained
from megatrain.config.loader import Config
from megatrain.data.tokenizer import load_tokenizer
from megatrain.distributed import device as device_module
from megatrain.distributed.activity import RankActivity
from megatrain.distributed.env import RankEnv
from megatrain.distributed.mesh import ProcessMesh, make_mesh
from megatrain.errors import ConfigError
from megatrain.evaluation import fingerprint
from megatrain.evaluation.classification import measure_classification
from megatrain.evaluation.loglikelihood import Scorer
from megatrain.evaluation.multiple_choice import measure_choices
from megatrain.evaluation.perplexity import measure_perplexity
from megatrain.evaluation.results import Results, format_results, write_results
from megatrain.evaluation.spec import EvalSpec, describe_settings
from megatrain.models.classification_config import any_architecture
from megatrain.models.config import TransformerConfig, load_hf_config
from megatrain.ops.dtypes import DTYPES
from megatrain.pipeline.stage_builder import build_stage
from megatrain.progress import progress_bar
from megatrain.telemetry.plots import plot_confusion_matrix
from megatrain.version import __version__

logger = logging.getLogger("megatrain")


class _Measured(NamedTuple):
    metrics: dict[str, Any]
    classes: dict[str, dict[str, float]]
    confusion: Any | None


def evaluate_rank(
    config: Config,
    env: RankEnv,
    activity: RankActivity | None = None,
    *,
    spec: EvalSpec,
    output: Path | None = None,
) -> Results:
    """Evaluates on this rank, together with all others; rank 0 writes and prints the results.

    Args:
        config: the settings of `make_config`.
        env: this rank.
        activity: records what the rank is doing.
        spec: the evaluation.
        output: a folder where each rank stores its results as RANK.json.

    Returns:
        The results. All ranks return the same metrics, except those of lm-evaluation-harness.
    """
    architecture = any_architecture(load_hf_config(config.model))
    device = device_module.select_device(env)
    mesh = make_mesh(
        env.rank,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        data=config.data_size(env.world_size),
        activity=activity,
    )
    mesh.activity.set_phase("evaluating")
    tokenizer = open_tokenizer(config.data.tokenizer, architecture)
    scorer = open_scorer(Path(spec.model), config, architecture, mesh, device)
    start = time.monotonic()
    with ThreadPoolExecutor(max_workers=1) as thread, _progress(env.rank, spec) as progress:
        hashes = thread.submit(_hash_inputs, spec, config.data.tokenizer, is_main=env.rank == 0)
        scorer.progress = progress
        measured = _measure(spec, scorer, tokenizer, architecture)
    seconds = time.monotonic() - start
    results = {
        "kind": spec.kind,
        "figures": _replace_nonfinite(measured.metrics),
        "classes": measured.classes,
        "model": {
            "path": spec.model,
            "sha256": hashes.result().get("model"),
            "model_type": architecture.model_type,
        },
        "tokenizer": {
            "path": config.data.tokenizer,
            "sha256": hashes.result().get("tokenizer"),
        },
        "data": {"paths": [*spec.data, *spec.tasks], "sha256": hashes.result().get("data")},
        "settings": describe_settings(spec, config, env.world_size),
        "versions": {"megatrain": __version__, "torch": torch.__version__},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(scorer.num_tokens / max(seconds, 1e-9), 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if env.rank == 0:
        results["path"] = str(_publish(results, measured, Path(config.run.output_dir), spec))
    if output is not None:
        (output / f"{env.rank}.json").write_text(json.dumps(results), encoding="utf-8")
    return results


def _measure(
    spec: EvalSpec, scorer: Scorer, tokenizer: Any, architecture: TransformerConfig
) -> _Measured:
    prefix = prefix_token(tokenizer, architecture)
    if spec.kind == "perplexity":
        vocab_size = architecture.vocab_size
        perplexity = measure_perplexity(spec, scorer, tokenizer, prefix, vocab_size)
        return _Measured(perplexity.metrics(), {}, None)
    if tokenizer is None:
        raise ConfigError(
            "data.tokenizer",
            None,
            f"is required for texts, but {spec.model} has no tokenizer",
            "set it to the folder of the model's tokenizer",
        )
    if spec.kind == "choices":
        return _Measured(measure_choices(spec, scorer, tokenizer, prefix).metrics(), {}, None)
    if spec.kind == "classification":
        return _Measured(*measure_classification(spec, scorer, tokenizer, architecture))
    from megatrain.evaluation.lm_eval import run_tasks  # requires megatrain[eval]

    return _Measured(run_tasks(spec, scorer, tokenizer, prefix), {}, None)


def open_scorer(
    folder: Path,
    config: Config,
    architecture: TransformerConfig,
    mesh: ProcessMesh,
    device: torch.device,
) -> Scorer:
    """Builds this rank's stage and loads its weights from a folder that was checked before."""
    dtype = DTYPES[config.train.dtype]
    stage = build_stage(config, architecture, mesh, str(device), dtype=dtype)
    Pretrained(folder, architecture).load_weights(stage, seed=0)
    return Scorer(stage, config, architecture, mesh, device)


def open_tokenizer(folder: str | None, architecture: TransformerConfig) -> Any:
    """Returns the tokenizer of a folder, None for None.

    Raises:
        ConfigError: it has more tokens than the model.
    """
    if folder is None:
        return None
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > architecture.vocab_size:
        raise ConfigError(
            "data.tokenizer",
            folder,
            f"has {len(tokenizer)} tokens, but the model has vocab_size={architecture.vocab_size}",
            "give the model's own tokenizer",
        )
    return tokenizer


def prefix_token(tokenizer: Any, architecture: TransformerConfig) -> int | None:
    """Returns the token before a text: BOS or else EOS, of the tokenizer or else of the model."""
    for owner in (tokenizer, architecture.config):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(owner, name, None)
            if isinstance(token, int) and 0 <= token < architecture.vocab_size:
                return token
    return None


class _LoggerStream(io.StringIO):
    """A stream whose lines are log messages: a rank's own stderr is its log file."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.info(f"  {text.strip()}")
        return len(text)


def _progress(rank: int, spec: EvalSpec) -> Any:
    stream = _LoggerStream() if rank == 0 and not spec.as_json else None
    return progress_bar(None, unit=" tokens", description="evaluating", stream=stream)


def _hash_inputs(spec: EvalSpec, tokenizer: str | None, *, is_main: bool) -> dict[str, str | None]:
    if not is_main:
        return {}
    return {
        "model": fingerprint.hash_model(Path(spec.model)),
        "tokenizer": fingerprint.hash_tokenizer(tokenizer),
        "data": fingerprint.hash_data(spec.data) if spec.data else None,
    }


def _publish(results: Results, measured: _Measured, folder: Path, spec: EvalSpec) -> Path:
    """Writes and prints the results; returns the path of their file."""
    path = write_results(results, folder, spec)
    if measured.confusion is not None:
        labels = list(measured.classes)
        plot_confusion_matrix(path.with_suffix(".png"), measured.confusion, labels)
    if spec.as_json:
        logger.info(json.dumps(results, indent=1))
    else:
        logger.info(f"{format_results(results)}\n\nwritten to {path}")
    return path


def _replace_nonfinite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the metrics with None for NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
