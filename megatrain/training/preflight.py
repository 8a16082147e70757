"""`megatrain check`: everything that can be known of a run on its ranks before one of them starts, without a GPU and in seconds.

All that is wrong is found and not the first alone: settings by themselves, the layout on the model, data, tokenizer and checkpoints, the
memory of every rank, and disk space. Nothing is made or changed, on disk or anywhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.config.fixes import IssueCollector
from megatrain.config.loader import Config, has_tokenizer
from megatrain.config.validation import problems, reset_invalid
from megatrain.data.gpt_dataset import parse_blend, select_paths
from megatrain.data.split import Part
from megatrain.errors import ConfigError, DataError, UserError
from megatrain.models.config import TransformerConfig
from megatrain.models.counts import layer_costs
from megatrain.models.quantize import check_bitsandbytes
from megatrain.pipeline.partition import cut_layers
from megatrain.pipeline.stage_builder import RankPlan, memory_schedule, plan_ranks
from megatrain.planner.disk import (
    check_free_space,
    estimate_disk,
    existing,
    in_bytes,
    is_open,
    kept_in_words,
    open_warning,
)
from megatrain.planner.memory import RankMemory, heaviest, predict
from megatrain.telemetry.exporters import check_exporters
from megatrain.training import checks
from megatrain.training.suggest import GIB, NARROW, OTHERS, Cluster, suggest
from megatrain.training.task import PretrainingTask, Task, text_instead


def preflight(config: Config, task: Task, place: Cluster, findings: IssueCollector) -> list[str]:
    """Look at everything; what is wrong goes to the findings, and the lines say what the run would be."""
    for problem in problems(config):
        if not findings.follows(problem):
            findings.add(problem)
    config = reset_invalid(config)
    if findings.passes(lambda: checks.check_start(config)):
        findings.attempt(lambda: task.check(config))
    findings.attempt(lambda: check_bitsandbytes(config.lora))
    findings.attempt(lambda: check_exporters(config))
    _files(config, task, findings)
    if checks.lacks_start(config):
        return []
    architecture = findings.attempt(lambda: task.architecture(config))
    if architecture is None:
        return []
    findings.attempt(
        lambda: checks.check_tokenizer(config, architecture),
        paste=_make_tokenizer(config, architecture),
    )
    _starts(config, architecture, findings)
    readable = [
        which
        for which in checks.parts_of(config)
        if not _missing(config, task, which)
        and findings.passes(partial(task.glance, config, architecture, which))
    ]
    epochs: list[str] = []
    if (
        config.train.epochs is not None
        and "train" in readable
        and not isinstance(task, PretrainingTask)
    ):
        config, epochs = _as_steps(config, task, architecture, findings)
    lines = []
    if _fits(config, architecture, place, findings):
        lines = [
            checks.run_header(config, architecture, place.world_size, _where(place)),
            *epochs,
            *_batch(config, place),
        ]
        lines += _memory(config, architecture, place, findings)
    if _writable(config, findings) and {
        config.train.steps,
        config.train.tokens,
        config.train.epochs,
    } != {None}:
        lines += _disk(config, architecture, findings)
    return lines


# -- files -------------------------------------------------------------------------------------------------------------


def _files(config: Config, task: Task, findings: IssueCollector) -> None:
    """Data that are not there, with the command that makes them."""
    for which in checks.parts_of(config):
        text = text_instead(config, which) if isinstance(task, PretrainingTask) else None
        if text is not None:
            findings.add(text)
            continue
        for path in _missing(config, task, which):
            findings.add(
                DataError(f"data.{which}={path} is not there"), paste=_make_data(config, task, path)
            )


def _missing(config: Config, task: Task, which: Part) -> list[str]:
    try:
        paths = [
            path
            for path, _ in parse_blend(select_paths(config.data, which)[0], setting=f"data.{which}")
        ]
    except UserError:
        return []  # said where settings are checked
    if isinstance(task, PretrainingTask):
        return [
            path
            for path in paths
            if not any(Path(f"{path}{end}").exists() for end in (".idx", ".bin"))
        ]
    return [path for path in paths if "*" not in path and not Path(path).exists()]


def _make_data(config: Config, task: Task, path: str) -> str:
    if path.startswith("demo/"):
        return (
            "make demo"
            if "functions" not in path
            else f"python tools/gather_functions.py {config.data.train} --valid {config.data.valid}"
        )
    if isinstance(task, PretrainingTask):
        return f"megatrain preprocess TEXTS.jsonl --tokenizer {config.data.tokenizer or 'TOKENIZER'} --output {path}"
    return f"cp YOURS.jsonl {path}"


def _make_tokenizer(config: Config, architecture: TransformerConfig) -> str:
    """For one that is not there; else the error says more itself."""
    folder = config.data.tokenizer
    if folder is None or Path(folder).exists():
        return ""
    if folder == "demo/tokenizer":
        return "make demo"
    if config.train.init_from is not None or config.lora.rank:
        return _own_tokenizer(config)
    texts = "TEXTS.jsonl" if not folder.startswith("demo/") else config.data.train
    return f"megatrain tokenizer {texts} --vocab-size {architecture.vocab_size} --output {folder}"


def _own_tokenizer(config: Config) -> str:
    """Weights that are there know a token by its number: a tokenizer trained anew would give the numbers other meanings."""
    start = config.train.init_from
    if start is None:
        return "data.tokenizer=FOLDER_OF_THE_MODEL"
    if not Path(start).exists():
        return (
            checks.make_start(start)
            if start == config.data.tokenizer
            else f"data.tokenizer={start}"
        )
    return (
        f"data.tokenizer={start}" if has_tokenizer(start) else "data.tokenizer=FOLDER_OF_THE_MODEL"
    )


def _starts(config: Config, architecture: TransformerConfig, findings: IssueCollector) -> None:
    """The checkpoint to resume from, the weights to start from, and the folder to write to."""
    named = config.checkpoint.resume not in ("auto", "never")
    path = findings.attempt(
        lambda: checks.check_resume(config, architecture),
        paste="checkpoint.resume=auto" if named else "",
    )
    start = config.train.init_from
    if start is not None and not Path(start).exists():
        findings.add(checks.no_start(start))
    elif start is not None:
        findings.attempt(
            lambda: checks.check_weights(config, architecture, resumes=path is not None),
            paste=_own_model(config, start),
        )


def _writable(config: Config, findings: IssueCollector) -> bool:
    """Tried with a folder that is gone at once: who may write where is not only a matter of modes."""
    place = existing(Path(config.run.output_dir))
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=place):
            return True
    except OSError as error:
        findings.add(
            ConfigError(
                "run.output_dir", config.run.output_dir, f"cannot be written ({error.strerror})"
            ),
            paste=f"run.output_dir=runs/{Path(config.run.output_dir).name}",
        )
        return False


def _own_model(config: Config, start: str) -> str:
    return (
        f"model={start}"
        if (Path(start) / "config.json").is_file() and config.model != start
        else ""
    )


# -- layout ------------------------------------------------------------------------------------------------------------


def _where(place: Cluster) -> str:
    kind = "GPUs" if place.device == "cuda" else "CPUs"
    return f"{place.nodes} x {place.ranks_per_node} {kind}" if place.nodes > 1 else kind


def _as_steps(
    config: Config, task: Task, architecture: TransformerConfig, findings: IssueCollector
) -> tuple[Config, list[str]]:
    """The config with its epochs as steps, where the data tell their samples in a moment, and the line that says how many those are."""
    source = findings.attempt(lambda: task.foresee(config, architecture))
    with_steps = (
        findings.attempt(lambda: checks.with_steps(config, source)) if source is not None else None
    )
    if with_steps is None:
        return config, []
    return with_steps, [f"  epochs  {config.train.epochs} x {source.per_epoch:,} samples"]


def _batch(config: Config, place: Cluster) -> Iterator[str]:
    data_size = config.data_size(place.world_size)
    yield (
        f"  batch   {config.train.global_batch_size} sequences = {config.microbatches(data_size)} microbatches of "
        f"{config.train.micro_batch_size} on each of {data_size} replicas"
    )


def _fits(config: Config, a: TransformerConfig, place: Cluster, findings: IssueCollector) -> bool:
    """Whether model, batch and ranks go together."""
    rules = checks.layout_rules(config, a, place.world_size, on_gpu=place.device == "cuda")
    passed = [findings.passes(rule) for rule in rules]  # each, and not up to the first that fails
    if not all(passed):  # the cut is not reached when the batch does not divide
        findings.attempt(
            lambda: cut_layers(
                layer_costs(a, config.data.sequence_length), config.parallel.pipeline
            )
        )
        return False
    _crossings(config, a, place, findings)
    return True


def _crossings(
    config: Config, a: TransformerConfig, place: Cluster, findings: IssueCollector
) -> None:
    """Tensor ranks are neighbours, and exchange every layer's activations: between machines that is what a step waits for."""
    p, g = config.parallel, place.ranks_per_node
    if place.nodes == 1 or g % p.tensor == 0:
        return
    inside = max(d for d in range(1, p.tensor + 1) if p.tensor % d == 0 and g % d == 0)
    stages = p.pipeline * p.tensor // inside
    words = f"parallel.tensor={inside}" + (
        f" parallel.pipeline={stages}" if stages <= a.num_layers else ""
    )
    findings.warnings.append(
        f"parallel.tensor={p.tensor} does not divide the {g} ranks of a machine: tensor groups leave it, and each layer waits for "
        f"the network; {words} stays inside"
    )


# -- memory ------------------------------------------------------------------------------------------------------------


def _memory(
    config: Config, a: TransformerConfig, place: Cluster, findings: IssueCollector
) -> list[str]:
    """A table of the ranks that differ, and what is said of the heaviest."""
    data_size = config.data_size(place.world_size)
    ranks = predict(config, a, data_size=data_size, device=place.device)
    plans = plan_ranks(config, a, memory_schedule(config, data_size).placement)
    top = heaviest(ranks)
    lines = [
        "",
        *table(config, plans, ranks, data_size),
        "",
        _heaviest(config, place, ranks[top], top),
    ]
    if any(rank.host for rank in ranks):
        on_node = (
            sum(sorted((rank.host for rank in ranks), reverse=True)[:1]) * place.ranks_per_node
        )
        lines.append(f"offload: up to {on_node / GIB:,.1f} GiB of a machine's own memory")
    if place.gpu_gib is not None and ranks[top].total > place.gpu_gib * GIB:
        words, paste = suggest(config, a, place, place.gpu_gib)
        findings.add(
            UserError(
                f"the heaviest rank takes {ranks[top].total / GIB:,.1f} GiB and a GPU has {place.gpu_gib:g}; {words}"
            ),
            paste=paste,
        )
    elif place.gpu_gib is not None and ranks[top].total > NARROW * place.gpu_gib * GIB:
        findings.warnings.append(
            f"the heaviest rank takes {ranks[top].total / place.gpu_gib / GIB:.0%} of a GPU's {place.gpu_gib:g} GiB, and {OTHERS}"
        )
    return lines


def table(
    config: Config, plans: list[RankPlan], ranks: list[RankMemory], data_size: int
) -> Iterator[str]:
    """One line for pipeline ranks with the same layers, with the memory of the one that takes most."""
    alike = config.parallel.tensor * data_size
    yield (
        f"{'pipeline ranks':>14}{'ranks':>7}  {'layers':<34}{'parameters':>15}  {'weights':>8}{'gradients':>10}{'optimizer':>10}"
        f"{'activations':>12}{'working':>8}{'GiB':>9}"
    )
    for group in _groups(plans):
        top = max(group, key=lambda rank: ranks[rank].total)
        memory, layers = ranks[top], ", ".join(checks.span(chunk) for chunk in plans[top].chunks)
        sizes = [
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.working,
            memory.total,
        ]
        cells = "".join(
            f"{size / GIB:>{width}.2f}"
            for size, width in zip(sizes, (8, 10, 10, 12, 8, 9), strict=True)
        )
        name = f"{group[0]}" if len(group) == 1 else f"{group[0]}-{group[-1]}"
        yield f"{name:>14}{len(group) * alike:>7}  {layers:<34}{memory.parameters:>15,}  {cells}"


def _groups(plans: list[RankPlan]) -> Iterator[list[int]]:
    """Neighbours with layers of the same kinds."""
    kinds: list[Any] = [[[spec.kind for spec in chunk] for chunk in plan.chunks] for plan in plans]
    start = 0
    for rank in range(1, len(plans) + 1):
        if rank == len(plans) or kinds[rank] != kinds[start]:
            yield list(range(start, rank))
            start = rank


def _heaviest(config: Config, place: Cluster, memory: RankMemory, rank: int) -> str:
    first = rank * config.data_size(place.world_size) * config.parallel.tensor
    of = f" of a GPU's {place.gpu_gib:g}" if place.gpu_gib is not None else ""
    return f"heaviest: {memory.total / GIB:,.2f} GiB{of} on pipeline rank {rank} (rank {first} and its peers), an estimate; see docs/check.md"


# -- disk --------------------------------------------------------------------------------------------------------------


def _disk(config: Config, a: TransformerConfig, findings: IssueCollector) -> list[str]:
    room = estimate_disk(config, a)
    findings.attempt(lambda: check_free_space(config, room))
    if is_open(config):
        findings.warnings.append(open_warning(config, room))
    return [
        f"checkpoints: {in_bytes(room.each)} each, {kept_in_words(config, room)}; {in_bytes(room.free)} are free at {room.place}"
    ]
