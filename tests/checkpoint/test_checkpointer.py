"""Background saves write the state at their start, and fail on all ranks together."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.rank_pool import run_ranks

from megatrain.checkpoint import checkpointer, manifest, retention
from megatrain.checkpoint.checkpointer import Checkpointer
from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.train_state import TrainState
from megatrain.config import loader as configuration
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.errors import CheckpointError
from megatrain.models.config import load_hf_config, read_config
from megatrain.planner.run_spec import describe_run

MODEL = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Run:
    """A runner at tensor 2 with its checkpointer, whose writer can be delayed."""

    def __init__(self, rank, folder):
        from megatrain.training.step_runner import StepRunner

        self.config = configuration.from_dict(
            {
                "model": MODEL,
                "parallel": {"tensor": 2},
                "train": {"steps": 9, "global_batch_size": 2},
                "checkpoint": {"keep_last": 2},
                "data": {"sequence_length": 16},
            }
        )
        architecture, mesh = read_config(load_hf_config(MODEL)), make_mesh(rank, tensor=2)
        self.runner = StepRunner(self.config, architecture, mesh, torch.device("cpu"))
        self.checkpointer = Checkpointer(
            folder,
            optimizer=self.runner.optimizer,
            mesh=mesh,
            run=describe_run(self.config, architecture, data_size=mesh.data.size),
            keep_last=2,
            keep_every=0,
            adapter_config=None,
            write_metadata=lambda folder: None,
        )
        self.folder, self.rank = folder, rank

    def step(self, number):
        tokens = torch.randint(0, 67, (1, 17), generator=torch.Generator().manual_seed(number))
        position = torch.arange(16)[None]
        self.runner.train_step(
            number, [Batch(tokens[:, :-1], tokens[:, 1:], position, torch.zeros_like(position))] * 2
        )

    def weights(self):
        return {name: p.detach().clone() for name, p in self.runner.stage.named_parameters()}


def delayed(event, *, fail_on=None):
    """Returns a `write_shard` that waits for the event, and fails on rank `fail_on`."""
    real = checkpointer.writer.write_shard

    def write_shard(temporary, content, *, rank, stage):
        assert event.wait(120)
        if rank == fail_on:
            raise OSError(5, "the disk is on fire")
        return real(temporary, content, rank=rank, stage=stage)

    return write_shard


def train_during_a_save(rank, world_size, folder):
    run, event, patch = Run(rank, folder), threading.Event(), pytest.MonkeyPatch()
    run.step(1)
    run.checkpointer.save(TrainState(1, 32, 1, losses=(4.0,)))
    run.checkpointer.finish()
    patch.setattr(checkpointer.writer, "write_shard", delayed(event))
    run.checkpointer.save(TrainState(10, 32, 1, losses=(4.0,)))  # the same state again
    before = run.weights()
    for number in (2, 3):
        run.step(number)
        assert run.checkpointer.is_writing
        assert run.checkpointer.proceed(anyone_writes=True) is None
    assert any(not torch.equal(now, before[name]) for name, now in run.weights().items())
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000001"]
    event.set()
    saved = run.checkpointer.finish()
    patch.undo()
    return saved.path, run.checkpointer.stalled > 0


def test_a_save_during_training_writes_the_state_at_its_start(tmp_path):
    for path, stalled in run_ranks(
        train_during_a_save, 2, tmp_path / "checkpoints", folder=tmp_path
    ):
        assert path == tmp_path / "checkpoints" / "step-00000010"
        assert stalled
    one, other = (tmp_path / "checkpoints" / name for name in ("step-00000001", "step-00000010"))
    assert manifest.find_problem(other, hashes=True) is None
    for name in (
        "model.safetensors",
        "optimizer/rank-00000.safetensors",
        "optimizer/rank-00001.safetensors",
        "optimizer/index.json",
    ):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert len(HFFolder(one).names()) == 21


def fail_on_one_rank(rank, world_size, folder):
    run, event, patch = Run(rank, folder), threading.Event(), pytest.MonkeyPatch()
    event.set()
    run.checkpointer.save(TrainState(1, 0, 0))
    run.checkpointer.finish()
    patch.setattr(checkpointer.writer, "write_shard", delayed(event, fail_on=1))
    run.checkpointer.save(TrainState(2, 0, 0))
    errors = []
    with pytest.raises(CheckpointError) as raised:
        run.checkpointer.finish()
    errors.append(str(raised.value))
    patch.undo()
    patch.setattr(
        checkpointer.shutil,
        "disk_usage",
        lambda path: type("Usage", (), {"free": 1000 if rank == 1 else 10**12}),
    )
    with pytest.raises(CheckpointError) as raised:
        run.checkpointer.save(TrainState(3, 0, 0))
    patch.undo()
    return [*errors, str(raised.value)]


def test_a_failure_on_one_rank_fails_all_and_keeps_earlier_checkpoints(tmp_path):
    first, second = run_ranks(fail_on_one_rank, 2, tmp_path, folder=tmp_path)
    assert first == second
    prefix, suffix = (
        "rank 1 could not write the checkpoint:",
        "earlier checkpoints are not affected",
    )
    assert first[0] == f"{prefix} [Errno 5] the disk is on fire; {suffix}"
    assert first[1] == (
        f"{prefix} {tmp_path} has 0.0 MB free and 0.3 MB are needed (No space left on device); "
        f"{suffix}"
    )
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000001"]
    assert manifest.find_problem(tmp_path / "step-00000001", hashes=True) is None


def save_repeatedly(rank, world_size, folder):
    run, event, patch = Run(rank, folder), threading.Event(), pytest.MonkeyPatch()
    patch.setattr(checkpointer.writer, "write_shard", delayed(event))
    assert run.checkpointer.save(TrainState(1, 0, 0)) is None
    threading.Timer(0.2, event.set).start()
    first = run.checkpointer.save(TrainState(2, 0, 0))
    paths = [first.path, run.checkpointer.finish().path, run.checkpointer.finish()]
    for step in (3, 4):
        run.checkpointer.save(TrainState(step, 0, 0), prune=step == 4)
        run.checkpointer.finish()
        paths.append(sorted(path.name for path in folder.glob("step-*")) if rank == 0 else None)
    patch.undo()
    return paths


def test_saves_are_sequential_and_old_checkpoints_are_deleted(tmp_path):
    (tmp_path / "c" / ".tmp-step-00000007" / "optimizer").mkdir(parents=True)
    (tmp_path / "c" / ".trash-step-00000001").mkdir()
    first, _ = run_ranks(save_repeatedly, 2, tmp_path / "c", folder=tmp_path)
    assert first[:3] == [tmp_path / "c" / "step-00000001", tmp_path / "c" / "step-00000002", None]
    assert first[3:] == [[f"step-{step:08d}" for step in steps] for steps in ([1, 2, 3], [3, 4])]
    assert not list((tmp_path / "c").glob(".*")), "leftovers of a killed run are deleted"


def make_checkpoints(folder, steps, *, damaged=()):
    for step in steps:
        path = folder / f".tmp-step-{step:08d}"
        path.mkdir(parents=True)
        (path / "x").write_text(str(step))
        manifest.commit(path, folder / f"step-{step:08d}", [manifest.make_record(path, path / "x")])
        if step in damaged:
            (folder / f"step-{step:08d}" / "x").write_text("longer")


@pytest.mark.parametrize(
    ("last", "every", "damaged", "deleted"),
    [
        (0, 0, (), []),
        (2, 0, (), [10, 20, 30]),
        (1, 0, (), [10, 20, 30, 40]),
        (9, 0, (), []),
        (1, 20, (), [10, 30]),
        (2, 30, (), [10, 20]),
        (1, 0, (50,), []),
        (2, 0, (50,), [10, 20, 30]),
        (2, 0, (40, 50), []),
        (1, 20, (50,), [10, 30]),
    ],
)
def test_retention(last, every, damaged, deleted, tmp_path):
    make_checkpoints(tmp_path, (10, 20, 30, 40, 50), damaged=damaged)
    old = retention.find_deletable(tmp_path, keep_last=last, keep_every=every)
    assert [path.name for path in old] == [f"step-{step:08d}" for step in deleted]
    retention.delete(old)
    remaining = {path.name for path in tmp_path.iterdir()}
    assert remaining == {f"step-{step:08d}" for step in (10, 20, 30, 40, 50) if step not in deleted}
    assert any(manifest.find_problem(tmp_path / name) is None for name in remaining)


def test_checkpoints_after_the_current_step_are_ignored(tmp_path):
    make_checkpoints(tmp_path, (10, 20, 30, 40, 50))
    assert [
        path.name
        for path in retention.find_deletable(tmp_path, keep_last=1, keep_every=0, current_step=30)
    ] == [
        "step-00000010",
        "step-00000020",
    ]
    assert retention.find_deletable(tmp_path, keep_last=1, keep_every=0, current_step=10) == []


@pytest.mark.parametrize(
    ("rollback_step", "damaged", "deleted"),
    [
        (45, (), [10, 20, 30]),
        (40, (), [10, 20, 30]),
        (35, (), [10, 20, 40]),
        (45, (40,), [10, 20, 40]),
        (5, (), [10, 20, 30, 40]),
        (60, (), [10, 20, 30, 40]),
    ],
)
def test_the_checkpoint_for_a_rollback_is_kept(rollback_step, damaged, deleted, tmp_path):
    make_checkpoints(tmp_path, (10, 20, 30, 40, 50), damaged=damaged)
    assert [
        path.name
        for path in retention.find_deletable(
            tmp_path, keep_last=1, keep_every=0, rollback_step=rollback_step
        )
    ] == [f"step-{step:08d}" for step in deleted]
