"""Every wait of a rank for other ranks is recorded in its activity, in all parts of a run."""

import inspect
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch.distributed as dist
from helpers.rank_pool import run_ranks

from megatrain.config import loader as configuration
from megatrain.data.indexed_dataset import IndexedWriter
from megatrain.distributed import collectives
from megatrain.distributed.activity import RankActivity
from megatrain.distributed.env import RankEnv
from megatrain.distributed.mesh import make_mesh
from megatrain.optim.zero import ZeroOptimizer
from megatrain.training import loss_spikes, shared_clock
from megatrain.training import run as training_run

BLOCKING = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
)


class Recorder:
    """Records every blocking call of torch.distributed, and the activity at that time."""

    def __init__(self, activity):
        self.activity, self.recorded, self.missing = activity, set(), set()

    def __call__(self, name):
        function = getattr(dist, name)
        signature = inspect.signature(function)

        def recording(*args, **options):
            given = signature.bind(*args, **options).arguments
            alone = (
                len(given.get("ranks") or range(2)) == 1
                if name == "new_group"
                else dist.get_world_size(given.get("group")) == 1
            )
            if not alone:
                where = next(
                    f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"
                    for frame in _frames()
                    if frame.f_globals["__name__"].startswith(("megatrain", "deepspeed"))
                )
                (self.recorded if self.activity.waits_for else self.missing).add((name, where))
            return function(*args, **options)

        return patch.object(dist, name, recording)


def _frames():
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def pretrain(rank, world_size, raw):
    """Trains with a rollback at step 4 and a non-finite step after it.

    Each rank is on a machine of its own for the shared clock.
    """
    config, activity = configuration.from_dict(raw), RankActivity()
    configuration.check(config)
    recorder, undone, refused = Recorder(activity), [], []

    def first_step_to_undo(state, stability):
        if state.step == 4 and not undone:
            undone.append(3)
            return 3
        return 0

    def has_nonfinite(zero, largest):
        if undone and not refused:
            refused.append(True)
            return True
        return False

    patches = [
        *map(recorder, BLOCKING),
        patch.object(loss_spikes, "first_step_to_undo", first_step_to_undo),
        patch.object(ZeroOptimizer, "has_nonfinite", has_nonfinite),
        patch.object(shared_clock, "machine_id", lambda: f"machine {rank}"),
    ]
    for each in patches:
        each.start()
    try:
        training_run.pretrain(
            config, RankEnv(rank, world_size, rank, world_size, "127.0.0.1", 29500), activity
        )
    finally:
        patch.stopall()
    return recorder.recorded, recorder.missing


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    with IndexedWriter(prefix, vocab_size=67) as writer:
        for document in np.random.default_rng(0).integers(0, 67, (60, 40)):
            writer.add(document)
    return prefix


def settings(data, folder, *, parallel, sections=(), **train):
    model = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": 67,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {
        "run": {"output_dir": str(folder / "run")},
        "model": model,
        "data": {"train": str(data), "valid": str(data), "sequence_length": 16},
        "parallel": parallel,
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            **train,
        },
        "eval": {"every": 1, "batches": 1},
        **dict(sections),
    }


def test_every_wait_of_a_run_is_recorded(data, tmp_path):
    first = settings(
        data,
        tmp_path,
        parallel={"pipeline": 2, "schedule": "auto"},
        steps=5,
        sections={
            "eval": {"every": 1, "batches": 1, "early_stopping_patience": 9},
            "checkpoint": {"save_every": 1},
            "stability": {"on_loss_spike": "rollback"},
            "profile": {"steps": [2, 3]},
        },
    )
    resumed = settings(data, tmp_path, parallel={"data": 2, "zero": 1}, steps=6, dtype="bf16")
    found = [
        each for raw in (first, resumed) for each in run_ranks(pretrain, 2, raw, folder=tmp_path)
    ]
    recorded = set().union(*(recorded for recorded, _ in found))
    missing = set().union(*(missing for _, missing in found))
    assert {where for _, where in missing if where.startswith("megatrain")} == set()
    # DeepSpeed's own collectives: at initialisation, and when masters are copied to weights.
    assert {name for name, _ in missing} <= {"broadcast", "all_gather_into_tensor"}
    assert {name for name, _ in recorded} >= {
        "all_gather_object",
        "broadcast_object_list",
        "all_reduce",
        "barrier",
        "new_group",
        "recv",
    }


def objects(rank, world_size):
    activity = RankActivity()
    mesh = make_mesh(rank, tensor=2, pipeline=2, activity=activity)
    activities, gather, broadcast = [], dist.all_gather_object, dist.broadcast_object_list

    def recording(function):
        return lambda *args, **options: (
            activities.append((activity.describe(), tuple(activity.waits_for))),
            function(*args, **options),
        )[1]

    with (
        patch.object(dist, "all_gather_object", recording(gather)),
        patch.object(dist, "broadcast_object_list", recording(broadcast)),
    ):
        results = [
            (
                collectives.gather_objects({rank: "x"}, axis),
                collectives.broadcast_object((rank, "y"), axis),
            )
            for axis in (mesh.world, mesh.tensor, mesh.pipeline, mesh.data)
        ]
    return results, activities, (activity.current_collective, tuple(activity.waits_for))


def test_object_collectives_are_recorded(tmp_path):
    for rank, (results, activities, after) in enumerate(run_ranks(objects, 4, folder=tmp_path)):
        lines = [(0, 1, 2, 3), (0, 1) if rank < 2 else (2, 3), (rank % 2, rank % 2 + 2), (rank,)]
        assert results == [([{other: "x"} for other in line], (line[0], "y")) for line in lines]
        expected = [
            (f"{collective} {name} (starting)", line)
            for name, line in zip(("world", "tensor", "pipeline"), lines, strict=False)
            for collective in ("all-gather", "broadcast")
        ]
        assert activities == expected, "a group of one rank exchanges no messages"
        assert after == (None, ())
