"""Who is whose peer on each axis."""

import pytest

from megatrain.distributed.mesh import global_ranks, make_mesh, shard_range


def meshes(**sizes):
    world = 1
    for size in sizes.values():
        world *= size
    return [make_mesh(rank, **sizes, connect=False) for rank in range(world)]


def test_tensor_ranks_are_neighbours_and_stages_are_far_apart():
    """[pipeline, data, tensor]"""
    assert global_ranks(tensor=2, pipeline=2, data=3).tolist() == [
        [[0, 1], [2, 3], [4, 5]],
        [[6, 7], [8, 9], [10, 11]],
    ]


def test_axes_of_a_rank_list_its_peers():
    mesh = make_mesh(8, tensor=2, pipeline=2, data=3, connect=False)
    assert (mesh.rank, mesh.world_size) == (8, 12)
    lines = {
        name: (getattr(mesh, name).rank, getattr(mesh, name).size, getattr(mesh, name).ranks)
        for name in ("tensor", "pipeline", "data", "model_parallel_group", "embedding_group")
    }
    assert lines == {
        "tensor": (0, 2, (8, 9)),
        "pipeline": (1, 2, (2, 8)),
        "data": (1, 3, (6, 8, 10)),
        "model_parallel_group": (2, 4, (2, 3, 8, 9)),
        "embedding_group": (1, 2, (2, 8)),
    }


SIZES = [
    {"tensor": t, "pipeline": p, "data": d} for t in (1, 2, 4) for p in (1, 2, 3) for d in (1, 2, 3)
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s.values())))
def test_each_axis_partitions_the_world(sizes):
    every = meshes(**sizes)
    for name in ("tensor", "pipeline", "data", "model_parallel_group"):
        axes = [getattr(mesh, name) for mesh in every]
        assert all(axis.ranks[axis.rank] == rank for rank, axis in enumerate(axes))
        assert all(axes[peer].ranks == axis.ranks for axis in axes for peer in axis.ranks)
        assert {axis.size for axis in axes} == {len(axes[0].ranks)}
    places = {(mesh.tensor.rank, mesh.pipeline.rank, mesh.data.rank) for mesh in every}
    assert len(places) == len(every)


@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_only_first_and_last_stage_are_in_the_embedding_group(pipeline):
    every = meshes(tensor=2, pipeline=pipeline)
    for rank, mesh in enumerate(every):
        inner = 0 < mesh.pipeline.rank < pipeline - 1
        expected = (rank,) if inner else (rank % 2, rank % 2 + 2 * (pipeline - 1))
        assert mesh.embedding_group.ranks == expected


def test_shard_range_splits_an_axis():
    parts = [shard_range(mesh.tensor, 2) for mesh in meshes(tensor=4, data=2)]
    assert [part.ranks for part in parts] == [(0, 1)] * 2 + [(2, 3)] * 2 + [(4, 5)] * 2 + [
        (6, 7)
    ] * 2
    assert [part.rank for part in parts] == [0, 1] * 4
