"""Copies of a rank's tensors in CPU memory, so that training continues while they are written.

The first data-parallel rank of each stage gathers the stage's tensors from its tensor-parallel
ranks. Each rank writes its own pieces of the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatrain.checkpoint.optimizer_state import OptimizerSnapshot, copy_fragments
from megatrain.distributed.collectives import all_gather, gather_objects
from megatrain.distributed.mesh import ProcessMesh
from megatrain.distributed.sharding import parameters
from megatrain.optim.zero import ZeroOptimizer


class CheckpointShard(NamedTuple):
    """One rank's part of a checkpoint: full model tensors by name, and optimizer pieces."""

    model: dict[str, Tensor]
    optimizer: OptimizerSnapshot

    @property
    def nbytes(self) -> int:
        tensors = [*self.model.values(), *self.optimizer.tensors.values()]
        return sum(tensor.nbytes for tensor in tensors)


def take_shard(optimizer: ZeroOptimizer, mesh: ProcessMesh) -> CheckpointShard:
    """Copies this rank's part of a checkpoint; all ranks call it together.

    Without ZeRO all replicas hold the same optimizer state, and the first one writes it.
    """
    holds_state = optimizer.zero_stage > 0 or mesh.data.rank == 0
    fragments = optimizer.state.fragments() if holds_state else ()
    return CheckpointShard(dict(_full_tensors(optimizer, mesh)), copy_fragments(fragments))


def _full_tensors(optimizer: ZeroOptimizer, mesh: ProcessMesh) -> Iterator[tuple[str, Tensor]]:
    """Yields the full trained tensors of this stage on tensor rank 0 of data rank 0.

    Other ranks only take part in the collectives. A tensor that several parameters share (fused
    query, key, value) is yielded once the last of them is gathered.
    """
    if mesh.data.rank != 0 and optimizer.zero_stage != 3:
        return
    trained = [
        (spec, parameter)
        for spec, parameter in parameters(optimizer.stage)
        if parameter.requires_grad
    ]
    specs_by_rank = gather_objects(
        [replace(spec, grad_reduce_axes=()) for spec, _ in trained], mesh.tensor
    )
    last = {spec.name: index for index, (spec, _) in enumerate(trained)}
    incomplete: dict[str, Tensor] = {}
    for index, (spec, parameter) in enumerate(trained):
        weights = optimizer.state.full_weights(parameter)
        parts = all_gather(weights[None].contiguous(), mesh.tensor)
        specs = [rank_specs[index] for rank_specs in specs_by_rank]
        # The other end's copy of a tied embedding has no owner and is not written.
        is_written = any(rank_spec.is_owner for rank_spec in specs)
        if mesh.data.rank != 0 or mesh.tensor.rank != 0 or not is_written:
            continue
        if spec.name not in incomplete:
            incomplete[spec.name] = torch.empty(spec.shape, dtype=weights.dtype)
        for rank_spec, part in zip(specs, parts, strict=True):
            rank_spec.unshard_into(rank_spec.local_view(part).cpu(), incomplete[spec.name])
        if last[spec.name] == index:
            yield spec.name, incomplete.pop(spec.name)
