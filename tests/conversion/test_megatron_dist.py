"""Megatron-LM's torch_dist checkpoints, which torch.distributed.checkpoint writes on two ranks."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.megatron_layout import MODULES, arguments, whole_tensors
from helpers.rank_pool import run_ranks
from helpers.tiny_folders import GPT2, LLAMA, convert, make_folder, tensors_of

from megatrain.conversion.megatron_dist import DistributedShard
from megatrain.errors import CheckpointError

CASES = {
    "llama": (LLAMA, False),
    "llama stacked": ({**LLAMA, "tie_word_embeddings": True}, True),
    "gpt2": (GPT2, True),
    "qwen3": ({**LLAMA, "model_type": "qwen3", "head_dim": 16}, False),
}


def save_in_chunks(rank, world_size, states):
    """Writes tensors that are split over ranks by rows or columns, or replicated."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    for folder, state in states.items():
        held = {}
        for number, (name, tensor) in enumerate(state.items()):
            dim = number % 3 if tensor.dim() > 1 else 0
            held[name] = distribute_tensor(
                tensor, mesh, [Replicate() if dim >= tensor.dim() else Shard(dim)]
            )
        held["optimizer.state.exp_avg.decoder.x"] = torch.zeros(3)
        held["decoder.layers.self_attention._extra_state/shard_0_2"] = {"scale": 1}
        dcp.save(held, checkpoint_id=folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("torch_dist")
    states = {}
    for name, (fields, stacked) in CASES.items():
        model = make_folder(root / name / "hf", fields)
        states[str(root / name / "run" / "iter_0000007")] = whole_tensors(model, stacked=stacked)
        (root / name / "run" / "iter_0000007").mkdir(parents=True)
        with mock.patch.dict(sys.modules, MODULES):
            torch.save(
                {"args": arguments(model.config, 2, 1), "checkpoint_version": 3.0},
                root / name / "run" / "iter_0000007" / "common.pt",
            )
        (root / name / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    run_ranks(save_in_chunks, 2, states, folder=root)
    return root


@pytest.mark.parametrize("name", CASES)
def test_conversion_restores_the_original_model(name, written, tmp_path, capfd):
    folder = written / name / "run"
    assert len(list((folder / "iter_0000007").glob("*.distcp"))) == 2
    assert convert(folder, tmp_path / "out", "--vocab-size", "67") == 0, capfd.readouterr().err
    assert "Megatron-LM checkpoint, torch_dist chunks (" in capfd.readouterr().out
    assert tensors_of(tmp_path / "out") == tensors_of(written / name / "hf")
    proof = json.loads((tmp_path / "out" / "conversion.json").read_text())["proof"]
    assert proof["source_computed_by"] == "a decoder on Megatron-LM's tensors"
    assert proof["max_logit_difference"] <= 1e-5


class Runs:
    """Pickles to a call of a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_metadata_runs_no_code(written, tmp_path):
    folder = shutil.copytree(written / "llama" / "run" / "iter_0000007", tmp_path / "copy")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Runs(tmp_path / "ran")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"is rejected: .*touch is not part of a checkpoint's metadata"
    ):
        DistributedShard(folder)
    assert not (tmp_path / "ran").exists()


def change_metadata(folder, change):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def point_outside(metadata):
    next(iter(metadata.storage_data.values())).relative_path = "../x"


def largest(folder):
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


DAMAGES = {
    "must be a file in the same folder": lambda folder: change_metadata(folder, point_outside),
    "do not contain each element exactly once": lambda folder: change_metadata(
        folder, lambda m: m.state_dict_metadata["output_layer.weight"].chunks.pop()
    ),
    "exceeds its shape": lambda folder: change_metadata(
        folder,
        lambda m: setattr(
            m.state_dict_metadata["output_layer.weight"].chunks[0], "sizes", torch.Size((99, 99))
        ),
    ),
    "is damaged": lambda folder: (folder / ".metadata").write_bytes(
        (folder / ".metadata").read_bytes()[:-40]
    ),
    "cannot be read": lambda folder: largest(folder).unlink(),
    "is truncated": lambda folder: os.truncate(largest(folder), 100),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_damaged_checkpoint_is_rejected(sentence, written, tmp_path, capfd):
    folder = shutil.copytree(written / "llama" / "run" / "iter_0000007", tmp_path / "copy")
    DAMAGES[sentence](folder)
    assert convert(folder, tmp_path / "out", "--vocab-size", "67") == 1
    err = capfd.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_mutated_metadata_and_chunks_are_read_or_rejected(written, tmp_path):
    folder = shutil.copytree(written / "llama" / "run" / "iter_0000007", tmp_path / "copy")
    files = [folder / ".metadata", *folder.glob("*.distcp")]
    whole = {path: path.read_bytes() for path in files}
    refused = 0
    for number in range(120):
        chance = random.Random(number)
        path = files[0] if number % 3 else chance.choice(files[1:])
        content = bytearray(whole[path])
        for _ in range(chance.choice([1, 1, 20])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            part = DistributedShard(folder)
            for name in part.names():
                part.view(name)
        except CheckpointError:
            refused += 1
        path.write_bytes(whole[path])
    assert 0 < refused < 120
