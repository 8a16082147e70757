"""From a config to a rank's model: who holds which layers, and the parts that one step needs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatrain.config import Config
from megatrain.models.architecture import Architecture
from megatrain.models.decoder import LayerSpec, build_layers, layer_list
from megatrain.models.parts import Parts
from megatrain.parallel.grid import Grid, make_grid
from megatrain.parallel.sharding import parameters
from megatrain.pipeline.executor import Stage
from megatrain.pipeline.stages import cut_layers


def layer_costs(architecture: Architecture, sequence_length: int) -> list[float]:
    """Multiplications a token in each layer, forward: embedding looks up, blocks and head multiply."""
    a = architecture
    attention = a.hidden_size * a.head_dim * 2 * (a.num_heads + a.num_kv_heads) + a.num_heads * a.head_dim * sequence_length
    block = attention + a.hidden_size * a.intermediate_size * (3 if a.gated else 2)
    return [float(a.hidden_size), *[float(block)] * a.num_layers, float(a.hidden_size * a.vocab_size)]


def stage_specs(config: Config, architecture: Architecture) -> list[list[LayerSpec]]:
    """Each stage's layers; together they are the model."""
    specs = layer_list(architecture)
    cuts = cut_layers(layer_costs(architecture, config.data.sequence_length), config.parallel.pipeline)
    return [specs[cut.start : cut.stop] for cut in cuts]


def build_stage(config: Config, architecture: Architecture, grid: Grid, device: str) -> Stage:
    """This rank's layers, in fp32 and uninitialised; DeepSpeed casts them to the run's dtype."""
    parts = Parts(architecture, grid, sequence=config.parallel.sequence, dtype=torch.float32, device=device)
    specs = stage_specs(config, architecture)[grid.pipeline.rank]
    return Stage(build_layers(specs, parts, recompute=config.train.recompute))


class StagePlan(NamedTuple):
    """What a stage holds: its layers, and parameters on each tensor rank."""

    specs: list[LayerSpec]
    parameters_per_rank: int
    counted: int


def plan_stages(config: Config, architecture: Architecture) -> list[StagePlan]:
    """Every stage built without memory; their parts are asserted to be the whole model."""
    p = config.parallel
    plans = []
    for stage, specs in enumerate(stage_specs(config, architecture)):
        counts = []
        for tensor_rank in range(p.tensor):
            grid = make_grid(stage * p.tensor + tensor_rank, tensor=p.tensor, pipeline=p.pipeline, connect=False)
            counts.append(_count(build_stage(config, architecture, grid, "meta")))
        plans.append(StagePlan(specs, counts[0][0], sum(counted for _, counted in counts)))
    assert sum(plan.counted for plan in plans) == total_parameters(architecture), "the stages are the model"
    return plans


def total_parameters(architecture: Architecture) -> int:
    """Parameters of the whole model, without padding."""
    parts = Parts(architecture, make_grid(0, connect=False), sequence=False, dtype=torch.float32, device="meta")
    return _count(build_layers(layer_list(architecture), parts, recompute="none"))[1]


def _count(module: torch.nn.Module) -> tuple[int, int]:
    """Elements held, and elements that count once in the whole model."""
    held = counted = 0
    for declaration, parameter in parameters(module):
        held += parameter.numel()
        if declaration.counted:
            size = 1
            for extent in declaration.part_shape():
                size *= extent
            counted += size
    return held, counted
