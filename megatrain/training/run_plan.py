"""The plan of a run as text: for `--dry-run`, `megatrain check` and the first lines of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from megatrain.config.issues import IssueCollector
from megatrain.config.loader import Config
from megatrain.distributed import device as device_module
from megatrain.errors import UserError
from megatrain.models.transformer import LayerSpec
from megatrain.planner import disk
from megatrain.planner.memory import RankMemory, heaviest, predict
from megatrain.planner.run_spec import Cluster, RunSpec
from megatrain.planner.suggest import MAX_FILL, RESERVE, suggest
from megatrain.telemetry import console
from megatrain.text import GIB, format_bytes
from megatrain.training.preflight import data_parts, output_error, prepare_part, validate_run
from megatrain.training.task import Task


def dry_run(config: Config, task: Task) -> str:
    """Prepares the data; returns batch sizes, layers and parameters of each pipeline rank.

    Errors of missing files, packages and of the data are notes. Any other error is raised.
    """
    world_size = config.local_world_size
    cluster = Cluster(1, world_size, "cuda" if device_module.has_gpu() else "cpu")
    issues, notes = IssueCollector(), IssueCollector()
    spec = validate_run(config, task, cluster, issues, file_issues=notes, read_data=False)
    issues.raise_first()
    assert spec is not None, "a run without errors has a spec"
    for part in data_parts(config):
        try:
            spec = prepare_part(spec, task, part)
        except UserError as error:
            notes.add(error)
    lines = [run_header(spec, "(dry run)"), _batch_line(spec)]
    if config.parallel.schedule == "auto" and config.parallel.pipeline > 1:
        lines.append("  schedule  measured before the first step; the plan shows 1f1b, its default")
    lines += [
        "",
        "pipeline rank  layers                                  parameters per tensor rank",
    ]
    for rank, plan in enumerate(spec.rank_plans):
        lines.append(f"{rank:>13}  {_layers(plan.chunks):<40}{plan.parameters_per_rank:>15,}")
    return "\n".join(lines + [f"note: {issue.message}" for issue in notes.errors])


def check_run(
    config: Config, task: Task, cluster: Cluster, issues: IssueCollector
) -> Iterator[str]:
    """Validates a run without starting it; yields the lines of its plan.

    Args:
        issues: receives all errors and warnings.
    """
    spec = validate_run(config, task, cluster, issues)
    _check_output_parent(config, issues)
    if spec is not None:
        yield from _check_plan(spec, issues)


def _check_plan(spec: RunSpec, issues: IssueCollector) -> Iterator[str]:
    """Yields the plan with memory and disk space; adds an error or warning if they do not fit."""
    cluster, train = spec.cluster, spec.config.train
    kind = "GPUs" if cluster.device == "cuda" else "CPUs"
    hosts = f"{cluster.nodes} x {cluster.ranks_per_node} {kind}" if cluster.nodes > 1 else kind
    yield run_header(spec, hosts)
    if spec.epochs is not None:
        yield f"  epochs  {spec.epochs} x {spec.samples_per_epoch:,} samples"
    yield _batch_line(spec)
    yield from _memory(spec, issues)
    is_writable = _write_error(Path(spec.config.run.output_dir)) is None
    if is_writable and (spec.steps is not None or train.epochs is not None):
        yield _disk(spec, issues)
    _check_tensor_groups(spec, issues)


def _check_output_parent(config: Config, issues: IssueCollector) -> None:
    """Adds an error if the output folder, or the parent to create it in, is read-only."""
    output = Path(config.run.output_dir)
    if reason := _write_error(output):
        issues.add(output_error(output, f"cannot be written ({reason})"))


def _write_error(output: Path) -> str | None:
    """Returns why a folder cannot be created at `output`, None if it can.

    Writes and deletes a folder: permissions alone do not show whether a folder is writable.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=disk.existing_folder(output)):
            return None
    except OSError as error:
        return error.strerror


def run_header(spec: RunSpec, device: str) -> str:
    """Returns the first lines of a run: model, layout, device and length."""
    config, parallel = spec.config, spec.config.parallel
    sequence = ", sequence" if parallel.sequence else ""
    text = console.header(
        name=config.run_name,
        model=spec.model.model_type,
        num_parameters=spec.num_parameters,
        layout=f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {spec.data_size}"
        f"{sequence}, {parallel.schedule}, ZeRO {parallel.zero}",
        device=f"{spec.cluster.world_size} ranks, {device}",
        dtype=config.train.dtype,
        tokens_per_step=config.tokens_per_step,
        steps=spec.steps,
        epochs=config.train.epochs,
    )
    if config.train.compile:
        text += "\n  compile the first step also compiles kernels, which can take a minute"
    if config.lora.rank:
        trained, quantized = spec.num_trained_parameters, config.lora.quantize != "none"
        base = " on weights in 4 bits" if quantized else ""
        text += (
            f"\n  lora    adapters of rank {config.lora.rank}{base}: "
            f"{trained:,} trained parameters, {trained / spec.num_parameters:.2%} of the model"
        )
    return text


def _batch_line(spec: RunSpec) -> str:
    train = spec.config.train
    return (
        f"  batch   {train.global_batch_size} sequences = {spec.microbatches} microbatches of "
        f"{train.micro_batch_size} on each of {spec.data_size} replicas"
    )


def _layers(stages: list[list[LayerSpec]]) -> str:
    """Returns the number of layers, and the first and last layer, of each virtual stage."""
    return ", ".join(
        f"{len(stage)}: {stage[0].title}" + (f" ... {stage[-1].title}" if len(stage) > 1 else "")
        for stage in stages
    )


def _check_tensor_groups(spec: RunSpec, issues: IssueCollector) -> None:
    """Adds a warning if tensor groups span machines: each layer would wait for the network."""
    parallel, on_node = spec.config.parallel, spec.cluster.ranks_per_node
    if spec.cluster.nodes == 1 or on_node % parallel.tensor == 0:
        return
    tensor = max(
        size
        for size in range(1, parallel.tensor + 1)
        if parallel.tensor % size == 0 and on_node % size == 0
    )
    stages = parallel.pipeline * parallel.tensor // tensor
    settings = f"parallel.tensor={tensor}"
    if stages <= spec.model.num_layers:
        settings += f" parallel.pipeline={stages}"
    issues.warnings.append(
        f"parallel.tensor={parallel.tensor} does not divide the {on_node} ranks of a machine: "
        "tensor groups span machines, and each layer waits for the network; "
        f"{settings} keeps them on one machine"
    )


# -- memory ----------------------------------------------------------------------------------------


def _memory(spec: RunSpec, issues: IssueCollector) -> Iterator[str]:
    """Yields a table of the ranks that differ; adds an error or a warning if one does not fit."""
    ranks = predict(spec)
    yield ""
    yield from _memory_table(spec, ranks)
    yield ""
    limit, index = spec.cluster.gpu_memory_gib, heaviest(ranks)
    total = ranks[index].total
    first = index * spec.data_size * spec.config.parallel.tensor
    of_gpu = f" of a GPU's {limit:g}" if limit is not None else ""
    yield (
        f"heaviest: {total / GIB:,.2f} GiB{of_gpu} on pipeline rank {index} "
        f"(rank {first} and its peers), an estimate; see docs/preflight.md"
    )
    if host := max(rank.host for rank in ranks):
        on_node = host * spec.cluster.ranks_per_node / GIB
        yield f"offload: up to {on_node:,.1f} GiB of CPU memory on each machine"
    if limit is None:
        return
    if total > limit * GIB:
        suggestion = suggest(spec, limit)
        text = f"the heaviest rank takes {total / GIB:,.1f} GiB and a GPU has {limit:g}"
        issues.add(
            UserError(
                f"{text}; {suggestion.hint}", fix=suggestion.fix, command=suggestion.arguments
            )
        )
    elif total > MAX_FILL * limit * GIB:
        share = total / limit / GIB
        issues.warnings.append(
            f"the heaviest rank takes {share:.0%} of a GPU's {limit:g} GiB, but {RESERVE}"
        )


def _memory_table(spec: RunSpec, ranks: list[RankMemory]) -> Iterator[str]:
    """Yields one line for neighbouring pipeline ranks with layers of the same kinds."""
    yield (
        f"{'pipeline ranks':>14}{'ranks':>7}  {'layers':<34}{'parameters':>15}  {'weights':>8}"
        f"{'gradients':>10}{'optimizer':>10}{'activations':>12}{'working':>8}{'GiB':>9}"
    )
    peers = spec.config.parallel.tensor * spec.data_size
    kinds = [[[layer.kind for layer in stage] for stage in stages] for stages in spec.layers]
    for _, members in groupby(range(len(kinds)), key=lambda rank: kinds[rank]):
        group = list(members)
        top = max(group, key=lambda rank: ranks[rank].total)
        memory = ranks[top]
        cells = (
            f"{memory.weights / GIB:>8.2f}{memory.gradients / GIB:>10.2f}"
            f"{memory.optimizer / GIB:>10.2f}{memory.activations / GIB:>12.2f}"
            f"{memory.working / GIB:>8.2f}{memory.total / GIB:>9.2f}"
        )
        name = f"{group[0]}" if len(group) == 1 else f"{group[0]}-{group[-1]}"
        layers = _layers(spec.layers[top])
        yield f"{name:>14}{len(group) * peers:>7}  {layers:<34}{memory.parameters:>15,}  {cells}"


# -- disk ------------------------------------------------------------------------------------------


def _disk(spec: RunSpec, issues: IssueCollector) -> str:
    estimate = disk.estimate_disk(spec)
    issues.attempt(lambda: disk.check_free_space(spec.config, estimate))
    if not estimate.is_bounded:
        issues.warnings.append(disk.unbounded_warning(spec.config, estimate))
    return (
        f"checkpoints: {format_bytes(estimate.checkpoint_bytes)} each, "
        f"{disk.describe_kept(spec.config, estimate)}; "
        f"{format_bytes(estimate.free_bytes)} are free at {estimate.folder}"
    )
