"""What a rank has to write, copied to CPU memory, so that training can go on while it is written.

The first data rank of each stage gathers the stage's tensors from its tensor ranks; each rank has its own pieces of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatrain.checkpoint.optimizer_state import OptimizerSnapshot, snapshot
from megatrain.distributed.collectives import all_gather, gather_objects
from megatrain.distributed.mesh import ProcessMesh
from megatrain.distributed.sharding import ShardSpec, parameters
from megatrain.optim.zero import ZeroOptimizer


class CheckpointShard(NamedTuple):
    """A rank's share of a checkpoint: whole tensors of the model by name, and its pieces of the optimizer."""

    model: dict[str, Tensor]
    optimizer: OptimizerSnapshot

    @property
    def nbytes(self) -> int:
        return sum(
            tensor.nbytes for tensor in [*self.model.values(), *self.optimizer.tensors.values()]
        )


def take_shard(zero: ZeroOptimizer, mesh: ProcessMesh) -> CheckpointShard:
    """This rank's share; all ranks call it together. Without ZeRO all replicas hold the same optimizer, and the first has it."""
    held = zero.config.parallel.zero > 0 or mesh.data.rank == 0
    return CheckpointShard(
        dict(_whole_tensors(zero, mesh)), snapshot(zero.fragments() if held else ())
    )


def _whole_tensors(zero: ZeroOptimizer, mesh: ProcessMesh) -> Iterator[tuple[str, Tensor]]:
    """Each whole tensor of this stage that is trained in turn, on tensor rank 0 of data rank 0; the other ranks only take part.

    A tensor that several parameters share (fused query, key, value) comes when the last of them was gathered.
    """
    if mesh.data.rank != 0 and zero.config.parallel.zero != 3:
        return
    mine = [
        (declaration, parameter)
        for declaration, parameter in parameters(zero.stage)
        if parameter.requires_grad
    ]
    declarations = gather_objects(
        [replace(declaration, grad_reduce_axes=()) for declaration, _ in mine], mesh.tensor
    )
    last = {declaration.name: index for index, (declaration, _) in enumerate(mine)}
    building: dict[str, Tensor] = {}
    for index, (declaration, parameter) in enumerate(mine):
        weights = zero.full_weights(parameter)
        parts = all_gather(weights[None].contiguous(), mesh.tensor)
        if mesh.data.rank != 0 or mesh.tensor.rank != 0 or not _written_here(declarations, index):
            continue
        if declaration.name not in building:
            building[declaration.name] = torch.empty(declaration.shape, dtype=weights.dtype)
        for their, part in zip(declarations, parts, strict=True):
            their[index].put(their[index].part_of(part).cpu(), building[declaration.name])
        if last[declaration.name] == index:
            yield declaration.name, building.pop(declaration.name)


def _written_here(declarations: list[list[ShardSpec]], index: int) -> bool:
    """A tensor is written by the stage that counts it; the other end's copy of a tied embedding is not."""
    return any(their[index].is_owner for their in declarations)
