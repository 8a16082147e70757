"""What makes a run fit whose heaviest rank takes more than a GPU has: settings are tried before they are said.

The least change first, on the machines that there are; where none of those fits, more stages on more machines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatrain.config.loader import Config
from megatrain.config.validation import problems
from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig
from megatrain.planner.memory import predict
from megatrain.training import checks

GIB = 2**30
NARROW = 0.92
"""Of a GPU's memory: beyond it a warning."""
OTHERS = "driver, communication and what the allocator cannot use need some as well"
"""Why."""


class Cluster(NamedTuple):
    """Where the run would be: machines, ranks on each, what they are (cuda or cpu), and a GPU's memory in GiB where it is known."""

    nodes: int
    ranks_per_node: int
    device: str
    gpu_gib: float | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


class Suggestion(NamedTuple):
    """A change in words to paste, and GiB of the heaviest rank with it."""

    words: str
    gib: float


def suggest(
    config: Config, a: TransformerConfig, place: Cluster, gpu_gib: float
) -> tuple[str, str]:
    """What is said of the ways out, and the line to paste: the first that leaves a GPU some room, else the lightest that fits."""
    tried: list[Suggestion] = []
    for changes in (_changes(config, place), _more_machines(config, place)):
        for words, changed, where in changes:
            gib = _heaviest(changed, a, where)
            if gib is not None and gib <= NARROW * gpu_gib:
                return f"with {words} it takes {gib:.3g}", words
            tried += [Suggestion(words, gib)] if gib is not None else []
        best, others = (
            min(tried, key=lambda each: each.gib, default=None),
            "; ".join(each.words for each in tried),
        )
        if best is not None and best.gib <= gpu_gib:
            return (
                f"with {best.words} it takes {best.gib:.3g}, {best.gib / gpu_gib:.0%} of a GPU, and {OTHERS} (tried: {others})",
                best.words,
            )
    if best is None:
        return "use more ranks: a larger parallel.pipeline or parallel.tensor", ""
    return (
        f"nothing that was tried fits: with {best.words} it takes least, {best.gib:.3g} GiB, which is {best.gib - gpu_gib:.3g} too much (tried: {others}); "
        "use larger GPUs, a shorter data.sequence_length or a smaller model"
    ), ""


def _heaviest(config: Config, a: TransformerConfig, place: Cluster) -> float | None:
    """GiB of the heaviest rank; None where the settings do not go together."""
    try:
        if next(iter(problems(config)), None) is not None:
            return None
        for rule in checks.layout_rules(config, a, place.world_size, on_gpu=True):
            rule()
        return (
            max(
                rank.total
                for rank in predict(
                    config, a, data_size=config.data_size(place.world_size), device=place.device
                )
            )
            / GIB
        )
    except ConfigError:
        return None


def _changes(config: Config, place: Cluster) -> Iterator[tuple[str, Config, Cluster]]:
    """One after the other: ZeRO 1, a smaller microbatch, recomputing, then more tensor ranks or stages, also with whole recomputing."""
    steps: list[dict[str, Any]] = []
    if config.parallel.zero == 0:
        steps.append({"parallel.zero": 1})
    if config.train.micro_batch_size % 2 == 0:
        steps.append({"train.micro_batch_size": config.train.micro_batch_size // 2})
    if config.parallel.tensor > 1 and not config.parallel.sequence:
        steps.append({"parallel.sequence": True})
    more = {"none": ("selective", "full"), "selective": ("full",), "full": ()}[
        config.train.recompute
    ]
    steps += [{"train.recompute": how} for how in more]
    for times in (2, 4, 8):
        for how in dict.fromkeys((config.train.recompute, "full")):
            recompute = {} if how == config.train.recompute else {"train.recompute": how}
            wider = {"parallel.tensor": config.parallel.tensor * times}
            if wider["parallel.tensor"] <= place.ranks_per_node:
                steps.append(wider | recompute)
            steps.append({"parallel.pipeline": config.parallel.pipeline * times} | recompute)
    for step in steps:
        free = (
            {"parallel.data": None}
            if config.parallel.data is not None
            and step.keys() & {"parallel.tensor", "parallel.pipeline"}
            else {}
        )
        yield _in_words(step | free), _replaced(config, step | free), place


def _more_machines(config: Config, place: Cluster) -> Iterator[tuple[str, Config, Cluster]]:
    """More stages of as many replicas, with whole recomputing."""
    for times in (2, 4, 8):
        step: dict[str, Any] = {"parallel.pipeline": config.parallel.pipeline * times}
        if config.train.recompute != "full":
            step["train.recompute"] = "full"
        where = place._replace(nodes=place.nodes * times)
        yield (
            f"{_in_words(step)} --nodes {where.nodes} --gpus-per-node {where.ranks_per_node}",
            _replaced(config, step),
            where,
        )


def _in_words(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={_word(value)}" for name, value in settings.items())


def _word(value: Any) -> str:
    return (
        {True: "true", None: "null"}.get(value, str(value))
        if value is True or value is None
        else str(value)
    )


def _replaced(config: Config, settings: dict[str, Any]) -> Config:
    for name, value in settings.items():
        section, key = name.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{key: value})}
        )
    return config
