"""From a config to a rank's model: who holds which layers, and the parts that one step needs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatrain.config.loader import Config
from megatrain.distributed.mesh import ProcessMesh, make_mesh
from megatrain.models.config import TransformerConfig
from megatrain.models.counts import count_module_parameters, count_parameters, layer_costs
from megatrain.models.params import ParamFactory
from megatrain.models.transformer import LayerSpec, build_chunks, layer_specs
from megatrain.pipeline.executor import Stage
from megatrain.pipeline.partition import check_stages, cut_by_counts, cut_layers
from megatrain.pipeline.registry import check_supported, find_spec, is_csv, make_schedule
from megatrain.pipeline.schedule import Placement, Schedule
from megatrain.pipeline.schedules import SCHEDULES, build_schedule


def run_schedule(config: Config, data_size: int) -> Schedule:
    """The schedule of a training step. On one rank there is nothing to fill: each backward follows its forward."""
    p, microbatches = config.parallel, config.microbatches(data_size)
    if p.pipeline == 1 or p.schedule == "auto":  # what auto begins with and may stay with
        return build_schedule("1f1b", p.pipeline, microbatches)
    return make_schedule(
        p.schedule,
        ranks=p.pipeline,
        microbatches=microbatches,
        virtual_stages=p.virtual,
        sequences_per_microbatch=config.train.micro_batch_size * data_size,
    )


def memory_schedule(config: Config, data_size: int) -> Schedule:
    """One in which each rank holds as much at once as in the run's: of no more microbatches than that takes, which on many stages are few."""
    p, microbatches = config.parallel, config.microbatches(data_size)
    name = "1f1b" if p.pipeline == 1 or p.schedule == "auto" else p.schedule
    if name not in SCHEDULES or not SCHEDULES[name].bounded_peak:
        return run_schedule(config, data_size)
    check_supported(
        name,
        ranks=p.pipeline,
        microbatches=microbatches,
        virtual_stages=p.virtual,
        sequences_per_microbatch=config.train.micro_batch_size * data_size,
    )
    return build_schedule(name, p.pipeline, min(microbatches, 2 * p.pipeline))


def check_pipeline(config: Config, architecture: TransformerConfig) -> None:
    """Refuse a schedule that there is not, and more stages than blocks, before a schedule of so many ranks is made."""
    p = config.parallel
    if p.schedule != "auto" and not is_csv(p.schedule):
        find_spec(p.schedule)
    family = SCHEDULES.get(p.schedule)
    chunks = (
        1
        if family is None
        else (p.virtual or family.chunks)
        if family.any_chunks
        else family.chunks
    )
    if p.pipeline > 1:
        check_stages(p.pipeline * chunks, blocks=architecture.num_layers, chunks=chunks)


def rank_specs(
    config: Config, architecture: TransformerConfig, placement: Placement
) -> list[list[list[LayerSpec]]]:
    """The layers of each pipeline rank's chunks; together they are the model."""
    specs = layer_specs(architecture)
    costs = layer_costs(architecture, config.data.sequence_length)
    told = config.parallel.layers_per_stage
    if told is None:
        cuts = cut_layers(costs, placement.stages, chunks=placement.chunks)
    else:
        cuts = cut_by_counts(told, costs, placement.stages, chunks=placement.chunks)
    stages = [specs[cut.start : cut.stop] for cut in cuts]
    return [
        [stages[placement.stage(rank, chunk)] for chunk in range(placement.chunks)]
        for rank in range(placement.ranks)
    ]


def build_stage(
    config: Config,
    architecture: TransformerConfig,
    mesh: ProcessMesh,
    device: str,
    placement: Placement | None = None,
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """This rank's layers, uninitialised; for training in fp32, which DeepSpeed casts to the run's dtype."""
    chunks = rank_specs(config, architecture, placement or Placement(mesh.pipeline.size))[
        mesh.pipeline.rank
    ]
    return build_layers_of(
        chunks, config=config, architecture=architecture, mesh=mesh, device=device, dtype=dtype
    )


def build_layers_of(
    chunks: list[list[LayerSpec]],
    *,
    config: Config,
    architecture: TransformerConfig,
    mesh: ProcessMesh,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """These layers as a stage of the rank whose mesh it is."""
    linears_on = "meta" if config.lora.quantize != "none" else None  # they are read one by one
    parts = ParamFactory(
        architecture,
        mesh,
        sequence=config.parallel.sequence,
        dtype=dtype,
        device=device,
        linears_on=linears_on,
        compiled=config.train.compile,
    )
    return Stage(build_chunks(chunks, parts, recompute=config.train.recompute))


class RankPlan(NamedTuple):
    """What a pipeline rank holds: its chunks of layers, and parameters on each tensor rank."""

    chunks: list[list[LayerSpec]]
    parameters_per_rank: int
    counted: int


def plan_ranks(
    config: Config, architecture: TransformerConfig, placement: Placement
) -> list[RankPlan]:
    """Every rank's layers built without memory, those of like ranks once; their parts are asserted to be the whole model."""
    plans = []
    seen: dict[tuple[tuple[str, ...], ...], list[tuple[int, int]]] = {}
    for rank, chunks in enumerate(rank_specs(config, architecture, placement)):
        kinds = tuple(
            tuple(spec.kind for spec in chunk) for chunk in chunks
        )  # blocks have parameters of the same shapes
        if kinds not in seen:
            seen[kinds] = _counts(rank, chunks, config, architecture)
        plans.append(
            RankPlan(chunks, seen[kinds][0][0], sum(counted for _, counted in seen[kinds]))
        )
    assert sum(plan.counted for plan in plans) == count_parameters(architecture), (
        "the ranks' parts are the model"
    )
    return plans


def _counts(
    rank: int, chunks: list[list[LayerSpec]], config: Config, architecture: TransformerConfig
) -> list[tuple[int, int]]:
    """Of each tensor rank of a pipeline rank."""
    p, counts = config.parallel, []
    for tensor_rank in range(p.tensor):
        mesh = make_mesh(
            rank * p.tensor + tensor_rank, tensor=p.tensor, pipeline=p.pipeline, connect=False
        )
        counts.append(
            count_module_parameters(
                build_layers_of(
                    chunks, config=config, architecture=architecture, mesh=mesh, device="meta"
                )
            )
        )
    return counts
