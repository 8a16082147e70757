"""Families of transformers become checkpoints of several layouts and return bit-exact."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.model_variants import VARIANTS
from helpers.rank_pool import run_ranks
from helpers.tiny_folders import convert, make_folder, tensors_of

from megatrain.config import loader as configuration

PAIRS = [
    {"tensor": 2},
    {"pipeline": 2},
    {"tensor": 2, "sequence": True},
    {"data": 2, "zero": 3},
    {"data": 2, "zero": 2},
]
NAMES = sorted(VARIANTS)
FORMER = {"embed_out.weight": "lm_head.weight"}
"""transformers saves the head of GPT-NeoX under its former name, and loads both names."""


def layouts(name):
    """Returns a layout of four ranks, and one of two ranks that differs between variants."""
    return {4: {"tensor": 2, "pipeline": 2}, 2: PAIRS[NAMES.index(name) % len(PAIRS)]}


def import_and_save(rank, world_size, root):
    """Saves the folder of each variant as a checkpoint, on the ranks of its layout."""
    from megatrain.checkpoint.checkpointer import Checkpointer
    from megatrain.checkpoint.hf_metadata import write_hf_metadata
    from megatrain.checkpoint.init_from_hf import Pretrained
    from megatrain.checkpoint.train_state import TrainState
    from megatrain.distributed.mesh import make_mesh
    from megatrain.models.config import load_hf_config, read_config
    from megatrain.models.counts import parameter_shapes
    from megatrain.planner.run_spec import describe_run
    from megatrain.training.step_runner import StepRunner

    for name in NAMES:
        parallel = layouts(name)[world_size]
        config = configuration.from_dict(
            {
                "model": str(root / name / "hf"),
                "data": {"sequence_length": 16},
                "parallel": parallel,
                "train": {"steps": 0, "global_batch_size": 4, "init_from": str(root / name / "hf")},
            }
        )
        architecture = read_config(load_hf_config(config.model))
        mesh = make_mesh(
            rank,
            tensor=config.parallel.tensor,
            pipeline=config.parallel.pipeline,
            data=config.data_size(world_size),
        )
        pretrained = Pretrained(root / name / "hf", architecture)
        pretrained.check(parameter_shapes(architecture))
        runner = StepRunner(config, architecture, mesh, torch.device("cpu"), pretrained=pretrained)
        saver = Checkpointer(
            root / name / f"ours-{world_size}",
            optimizer=runner.optimizer,
            mesh=mesh,
            run=describe_run(config, architecture, data_size=mesh.data.size),
            keep_last=0,
            keep_every=0,
            adapter_config=None,
            write_metadata=lambda path, architecture=architecture: write_hf_metadata(
                path, architecture, dtype=torch.float32, tokenizer=None, chat=None
            ),
        )
        saver.save(TrainState(0, 0, 0))
        saver.finish()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    for seed, name in enumerate(NAMES):
        make_folder(root / name / "hf", VARIANTS[name], seed, shard="5GB" if seed % 2 else "30KB")
    for world_size in (4, 2):
        run_ranks(import_and_save, world_size, root, folder=root)
    return root


@pytest.mark.parametrize("world_size", [4, 2])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_keeps_bytes_and_logits(name, world_size, imported, tmp_path, capfd):
    assert convert(imported / name / f"ours-{world_size}", tmp_path / "out", "--to", "hf") == 0, (
        capfd.readouterr().err
    )
    assert tensors_of(tmp_path / "out") == {
        FORMER.get(theirs, theirs): held
        for theirs, held in tensors_of(imported / name / "hf").items()
    }
    assert not [
        path
        for path in (tmp_path / "out").rglob("*")
        if path.name in ("train_state.json", "manifest.json", "optimizer")
    ]
    proof = json.loads((tmp_path / "out" / "conversion.json").read_text())["proof"]
    assert (proof["source_computed_by"], proof["target_computed_by"]) == (
        "our layers",
        "transformers",
    )
    assert proof["max_logit_difference"] <= 1e-5
    from transformers import AutoModelForCausalLM

    one, two = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (imported / name / "hf", tmp_path / "out")
    )
    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        assert torch.equal(one(tokens).logits, two(tokens).logits)
