"""Builds the stage of a rank: its schedule, its layers and their modules."""

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
    """Returns the schedule of a training step; 1f1b for one rank, and for `auto` to start from."""
    p, microbatches = config.parallel, config.microbatches(data_size)
    if p.pipeline == 1 or p.schedule == "auto":
        return build_schedule("1f1b", p.pipeline, microbatches)
    return make_schedule(
        p.schedule,
        ranks=p.pipeline,
        microbatches=microbatches,
        virtual_stages=p.virtual,
        sequences_per_microbatch=config.train.micro_batch_size * data_size,
    )


def memory_schedule(config: Config, data_size: int) -> Schedule:
    """Returns a schedule with the run's peak activations and as few microbatches as possible."""
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
    """Raises ConfigError for an unknown schedule, or for more stages than blocks."""
    p = config.parallel
    if p.schedule != "auto" and not is_csv(p.schedule):
        find_spec(p.schedule)
    spec = SCHEDULES.get(p.schedule)
    chunks = 1 if spec is None else spec.chunks
    if spec is not None and spec.any_chunks and p.virtual:
        chunks = p.virtual
    if p.pipeline > 1:
        check_stages(p.pipeline * chunks, blocks=architecture.num_layers, chunks=chunks)


def rank_specs(
    config: Config, architecture: TransformerConfig, placement: Placement
) -> list[list[list[LayerSpec]]]:
    """Returns the layers of each chunk of each pipeline rank; together they are the model."""
    specs = layer_specs(architecture)
    costs = layer_costs(architecture, config.data.sequence_length)
    counts = config.parallel.layers_per_stage
    if counts is None:
        cuts = cut_layers(costs, placement.stages, chunks=placement.chunks)
    else:
        cuts = cut_by_counts(counts, costs, placement.stages, chunks=placement.chunks)
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
    """Returns this rank's layers, uninitialised.

    Training builds them in fp32; DeepSpeed casts them to the run's dtype.
    """
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
    """Returns the modules of the given layers as a stage of the rank of `mesh`."""
    params = ParamFactory(
        architecture,
        mesh,
        sequence=config.parallel.sequence,
        dtype=dtype,
        device=device,
        # Linear layers that will be quantized are loaded one by one.
        linears_on="meta" if config.lora.quantize != "none" else None,
        compiled=config.train.compile,
    )
    return Stage(build_chunks(chunks, params, recompute=config.train.recompute))


class RankPlan(NamedTuple):
    """Layers and parameters of a pipeline rank.

    Attributes:
        chunks: layers of each chunk.
        parameters_per_rank: parameters that each of its tensor ranks stores.
        counted: parameters that its tensor ranks own together.
    """

    chunks: list[list[LayerSpec]]
    parameters_per_rank: int
    counted: int


def plan_ranks(
    config: Config, architecture: TransformerConfig, placement: Placement
) -> list[RankPlan]:
    """Returns the plan of each pipeline rank, from modules on the meta device.

    Ranks with the same kinds of layers are built once. Asserts that the ranks' parameters add up to
    those of the model.
    """
    plans = []
    counts: dict[tuple[tuple[str, ...], ...], tuple[int, int]] = {}
    for rank, chunks in enumerate(rank_specs(config, architecture, placement)):
        kinds = tuple(tuple(spec.kind for spec in chunk) for chunk in chunks)
        if kinds not in counts:
            counts[kinds] = _count_parameters(rank, chunks, config, architecture)
        plans.append(RankPlan(chunks, *counts[kinds]))
    assert sum(plan.counted for plan in plans) == count_parameters(architecture)
    return plans


def _count_parameters(
    rank: int, chunks: list[list[LayerSpec]], config: Config, architecture: TransformerConfig
) -> tuple[int, int]:
    """Returns the stored parameters of tensor rank 0, and the owned ones of all tensor ranks."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    counts = []
    for tensor_rank in range(tensor):
        mesh = make_mesh(
            rank * tensor + tensor_rank, tensor=tensor, pipeline=pipeline, connect=False
        )
        stage = build_layers_of(
            chunks, config=config, architecture=architecture, mesh=mesh, device="meta"
        )
        counts.append(count_module_parameters(stage))
    return counts[0][0], sum(owned for _, owned in counts)
