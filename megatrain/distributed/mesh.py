"""Who am I on each axis of the layout, and who are my peers.

Ranks fill a box of pipeline x data x tensor, tensor fastest, so that tensor ranks, which talk most, are neighbours on
one machine (Megatron-LM SC21, section 3.2). An axis of size 1 has no process group: its collectives are the identity.
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
    """This rank's line of peers along one axis.

    Attributes:
        rank: this rank's place on the axis.
        size: how many ranks the axis has.
        ranks: the peers' global ranks, this one included, in order.
        group: their process group; None when the axis has one rank, is the world, or the grid was made without processes.
        name: what a note calls it.
        activity: where collectives along the axis are noted.
    """

    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None
    name: str = ""
    activity: RankActivity = field(default_factory=RankActivity, compare=False, repr=False)


@dataclass(frozen=True)
class ProcessMesh:
    """The layout as this rank sees it; passed to whoever needs it, never global."""

    rank: int
    world_size: int
    tensor: MeshAxis
    pipeline: MeshAxis
    data: MeshAxis
    model_parallel_group: MeshAxis
    """All ranks of this rank's replica: tensor x pipeline."""
    embedding_group: MeshAxis
    """First and last stage with this rank's tensor and data place: those that share a tied embedding."""
    world: MeshAxis
    """All ranks of the run, in torch's own group."""
    self_group: dist.ProcessGroup | None = None
    """This rank alone, for libraries that want a group where we have none."""

    @property
    def activity(self) -> RankActivity:
        """Where this rank notes what it is doing."""
        return self.world.activity


def box(*, tensor: int, pipeline: int, data: int) -> np.ndarray:
    """Global ranks by [pipeline, data, tensor]."""
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
    """This rank's grid, its collectives noted in `activity`; with `connect` every rank of the world must call it together, since it makes process groups."""
    ranks = box(tensor=tensor, pipeline=pipeline, data=data)
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
    return ProcessMesh(
        rank=rank,
        world_size=ranks.size,
        world=world,
        self_group=new_group((rank,), name="self_group", activity=activity) if connect else None,
        **axes,
    )


def shard_range(axis: MeshAxis, size: int) -> MeshAxis:
    """The `size` neighbours of this rank on the axis: ranks [k*size, (k+1)*size) of it. All of the axis call it together."""
    first = axis.rank // size * size
    ranks = axis.ranks[first : first + size]
    group = (
        new_group(ranks, name=axis.name, activity=axis.activity)
        if axis.group is not None and size > 1
        else None
    )
    return MeshAxis(
        rank=axis.rank - first,
        size=size,
        ranks=ranks,
        group=group,
        name=axis.name,
        activity=axis.activity,
    )


def _axis(
    rank: int, lines: np.ndarray, connect: bool, name: str, activity: RankActivity
) -> MeshAxis:
    mine = next((tuple(line) for line in lines.tolist() if rank in line), (rank,))
    # Also for a rank alone on a line of others' (see new_group).
    group = (
        new_group(mine, name=name, activity=activity) if connect and lines.shape[1] > 1 else None
    )
    return MeshAxis(
        rank=mine.index(rank),
        size=len(mine),
        ranks=mine,
        group=group if len(mine) > 1 else None,
        name=name,
        activity=activity,
    )


def new_group(ranks: tuple[int, ...], *, name: str, activity: RankActivity) -> dist.ProcessGroup:
    """A group of `ranks`, this one included. Only they meet, so that a grid costs the same on 4 ranks and on 4096.

    torch names the group after its ranks and the number of groups that the caller made before. Unless all ranks of the
    world have made equally many, members wait for each other under different names for ever: so whoever is left out of a
    round of groups makes one of itself.
    """
    import torch.distributed as dist

    with activity.collective("making the group", WorldGroup(ranks, name)):
        return dist.new_group(list(ranks), use_local_synchronization=True)
