"""Suggests settings that make a run fit into GPU memory; each is tried before it is suggested.

Changes with the least cost come first. If none fits on the given machines, more pipeline stages on
more machines are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from megatrain.config.validation import find_errors
from megatrain.errors import ConfigError, format_override
from megatrain.planner.memory import predict
from megatrain.planner.run_spec import Cluster, RunSpec, replace_settings, resolve_layout
from megatrain.text import GIB

MAX_FILL = 0.92
"""The share of a GPU's memory above which a prediction is too close to the limit."""
RESERVE = "driver, communication buffers and fragmentation need memory too"


class Suggestion(NamedTuple):
    """A hint, with the settings or the command line arguments that follow it."""

    hint: str
    fix: dict[str, Any]
    arguments: str = ""


class _Candidate(NamedTuple):
    """Changed settings, and the memory of the heaviest rank with them."""

    settings: dict[str, Any]
    cluster: Cluster
    gib: float
    text: str


def suggest(spec: RunSpec, gpu_gib: float) -> Suggestion:
    """Returns the first change that leaves room on a GPU, else the one with the least memory."""
    tried: list[_Candidate] = []
    for changes in (_changes(spec), _more_machines(spec)):
        for settings, cluster in changes:
            candidate = _try(spec, settings, cluster)
            if candidate is None:
                continue
            if candidate.gib <= MAX_FILL * gpu_gib:
                return _suggestion(
                    spec, candidate, f"with {candidate.text} it takes {candidate.gib:.3g}"
                )
            tried.append(candidate)
        best = min(tried, key=lambda candidate: candidate.gib, default=None)
        others = "; ".join(candidate.text for candidate in tried)
        if best is not None and best.gib <= gpu_gib:
            hint = f"with {best.text} it takes {best.gib:.3g}, {best.gib / gpu_gib:.0%} of a GPU"
            return _suggestion(spec, best, f"{hint}, but {RESERVE} (tried: {others})")
    if best is None:
        return Suggestion("use more ranks: a larger parallel.pipeline or parallel.tensor", {})
    return Suggestion(
        f"no change that was tried fits: {best.text} takes least, {best.gib:.3g} GiB, "
        f"which is {best.gib - gpu_gib:.3g} too much (tried: {others}); "
        "use larger GPUs, a shorter data.sequence_length or a smaller model",
        {},
    )


def _suggestion(spec: RunSpec, candidate: _Candidate, hint: str) -> Suggestion:
    if candidate.cluster == spec.cluster:
        return Suggestion(hint, candidate.settings)
    return Suggestion(hint, {}, candidate.text)


def _try(spec: RunSpec, settings: dict[str, Any], cluster: Cluster) -> _Candidate | None:
    """Returns the candidate with its predicted memory; None if its settings conflict."""
    config = replace_settings(spec.config, settings)
    if next(find_errors(config), None) is not None:
        return None
    try:
        ranks = predict(resolve_layout(config, spec.model, cluster))
    except ConfigError:
        return None
    text = " ".join(format_override(name, value) for name, value in settings.items())
    if cluster != spec.cluster:
        text += f" --nodes {cluster.nodes} --gpus-per-node {cluster.ranks_per_node}"
    return _Candidate(settings, cluster, max(rank.total for rank in ranks) / GIB, text)


def _changes(spec: RunSpec) -> Iterator[tuple[dict[str, Any], Cluster]]:
    """Yields ZeRO 1, smaller microbatches, recomputation, then more tensor ranks or stages."""
    parallel, train = spec.config.parallel, spec.config.train
    if parallel.zero == 0:
        yield {"parallel.zero": 1}, spec.cluster
    if train.micro_batch_size % 2 == 0:
        yield {"train.micro_batch_size": train.micro_batch_size // 2}, spec.cluster
    if parallel.tensor > 1 and not parallel.sequence:
        yield {"parallel.sequence": True}, spec.cluster
    levels = ["none", "selective", "full"]
    for level in levels[levels.index(train.recompute) + 1 :]:
        yield {"train.recompute": level}, spec.cluster
    derived: dict[str, Any] = {} if parallel.data is None else {"parallel.data": None}
    for factor in (2, 4, 8):
        for level in dict.fromkeys((train.recompute, "full")):
            recompute = {} if level == train.recompute else {"train.recompute": level}
            if parallel.tensor * factor <= spec.cluster.ranks_per_node:
                tensor = {"parallel.tensor": parallel.tensor * factor}
                yield tensor | recompute | derived, spec.cluster
            stages = {"parallel.pipeline": parallel.pipeline * factor}
            yield stages | recompute | derived, spec.cluster


def _more_machines(spec: RunSpec) -> Iterator[tuple[dict[str, Any], Cluster]]:
    """Yields more stages on more machines for as many replicas, with full recomputation."""
    for factor in (2, 4, 8):
        settings: dict[str, Any] = {"parallel.pipeline": spec.config.parallel.pipeline * factor}
        if spec.config.train.recompute != "full":
            settings["train.recompute"] = "full"
        yield settings, spec.cluster._replace(nodes=spec.cluster.nodes * factor)
