"""The process mesh: this rank's coordinates and process groups along each parallelism axis.

Ranks fill a box of pipeline x data x tensor, with tensor fastest. Tensor ranks communicate most,
and so are neighbours on one machine (Megatron-LM, SC21, section 3.2). An axis of size 1 has no
process group: its collectives are the identity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatrain.distributed.activity import RankActivity, WorldGroup

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True)
class MeshAxis:
    """The ranks along one axis of the mesh that include this rank.

    Attributes:
        rank: this rank's coordinate on the axis.
        size: number of ranks on the axis.
        ranks: their global ranks in order, including this rank.
        group: their process group; None for one rank, for the world, and in a mesh without
            processes.
        name: the name in logs and in the watchdog's reports.
        activity: records collectives along the axis.
    """

    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None
    name: str = ""
    activity: RankActivity = field(default_factory=RankActivity, compare=False, repr=False)


@dataclass(frozen=True)
class ProcessMesh:
    """The layout from one rank's view. It is passed to its users and never global.

    Attributes:
        model_parallel_group: all ranks of this rank's replica, tensor x pipeline.
        embedding_group: first and last stage with this rank's tensor and data coordinates, which
            share a tied embedding.
        world: all ranks of the run, in torch's default group.
        self_group: this rank alone, for libraries that require a group.
    """

    rank: int
    world_size: int
    tensor: MeshAxis
    pipeline: MeshAxis
    data: MeshAxis
    model_parallel_group: MeshAxis
    embedding_group: MeshAxis
    world: MeshAxis
    self_group: dist.ProcessGroup | None = None

    @property
    def activity(self) -> RankActivity:
        """The record of this rank's current activity."""
        return self.world.activity


def global_ranks(*, tensor: int, pipeline: int, data: int) -> np.ndarray:
    """Returns the global ranks as an array [pipeline, data, tensor]."""
    return np.arange(tensor * pipeline * data).reshape(pipeline, data, tensor)


def make_mesh(
    rank: int,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    connect: bool = True,
    activity: RankActivity | None = None,
) -> ProcessMesh:
    """Returns the mesh of this rank.

    Args:
        connect: create process groups; then all ranks of the world call this together.
        activity: records this rank's collectives.
    """
    ranks = global_ranks(tensor=tensor, pipeline=pipeline, data=data)
    lines = {
        "tensor": ranks.reshape(-1, tensor),
        "pipeline": ranks.reshape(pipeline, -1).T,
        "data": ranks.transpose(0, 2, 1).reshape(-1, data),
        "model_parallel_group": ranks.transpose(1, 0, 2).reshape(data, -1),
        "embedding_group": ranks[[0, -1]].reshape(2, -1).T
        if pipeline > 1
        else ranks.reshape(-1, 1),
    }
    activity = activity or RankActivity()
    axes = {name: _axis(rank, groups, connect, name, activity) for name, groups in lines.items()}
    world = MeshAxis(rank, ranks.size, tuple(range(ranks.size)), name="world", activity=activity)
    self_group = new_group((rank,), name="self_group", activity=activity) if connect else None
    return ProcessMesh(rank=rank, world_size=ranks.size, world=world, self_group=self_group, **axes)


def shard_range(axis: MeshAxis, size: int) -> MeshAxis:
    """Returns the part [k*size, (k+1)*size) of an axis that includes this rank.

    All ranks of the axis call this together.
    """
    first = axis.rank // size * size
    ranks = axis.ranks[first : first + size]
    group = None
    if axis.group is not None and size > 1:
        group = new_group(ranks, name=axis.name, activity=axis.activity)
    return MeshAxis(axis.rank - first, size, ranks, group, axis.name, axis.activity)


def _axis(
    rank: int, lines: np.ndarray, connect: bool, name: str, activity: RankActivity
) -> MeshAxis:
    ranks = next((tuple(line) for line in lines.tolist() if rank in line), (rank,))
    # A rank alone also makes a group where others make larger ones (see new_group).
    group = (
        new_group(ranks, name=name, activity=activity) if connect and lines.shape[1] > 1 else None
    )
    return MeshAxis(
        rank=ranks.index(rank),
        size=len(ranks),
        ranks=ranks,
        group=group if len(ranks) > 1 else None,
        name=name,
        activity=activity,
    )


def new_group(ranks: tuple[int, ...], *, name: str, activity: RankActivity) -> dist.ProcessGroup:
    """Creates the process group of `ranks`, which include this rank.

    Only its members synchronise, so that a mesh costs the same on 4 ranks and on 4096. torch names
    a group after its ranks and the number of groups that the caller has created. Members with
    different numbers would wait for each other under different names. So every rank creates a group
    in each round, if only of itself.
    """
    import torch.distributed as dist

    with activity.collective("making the group", WorldGroup(ranks, name)):
        return dist.new_group(list(ranks), use_local_synchronization=True)
