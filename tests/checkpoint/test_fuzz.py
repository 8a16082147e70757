"""Reading a damaged folder raises CheckpointError or ConfigError, or succeeds.

It never crashes, blocks, runs code or touches other files. Real folders are damaged at random: a
byte, a value, a file, or several. Each case is a seed and can be run alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers.model_folders import KINDS, write
from helpers.rank_pool import run_ranks
from helpers.training_runs import pretrain

from megatrain.checkpoint import manifest, resume
from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.init_from_hf import Pretrained
from megatrain.checkpoint.optimizer_state import OptimizerState
from megatrain.config import loader as configuration
from megatrain.data.indexed_dataset import IndexedWriter
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.errors import CheckpointError, ConfigError
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.counts import parameter_shapes
from megatrain.optim.zero_state import Fragment
from megatrain.pipeline.stage_builder import build_stage
from megatrain.planner.run_spec import choose_start, describe_run

MODEL = {
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOCKS, CASES = 12, 60
"""720 cases."""


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def settings(folder):
    return {
        "run": {"output_dir": str(folder / "run")},
        "model": MODEL,
        "train": {"steps": 2, "global_batch_size": 2},
        "checkpoint": {"save_every": 1},
        "data": {"train": str(folder / "tokens"), "sequence_length": 8},
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A model in each format, one with a `Trap` inside, and a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        write(folder / kind, kind)
    write(folder / "trap", "bin")
    torch.save(
        {"a": torch.zeros(2), "b": Trap(folder / "trap ran")},
        folder / "trap" / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    with IndexedWriter(folder / "tokens", vocab_size=19) as writer:
        writer.add(np.arange(100) % 19)
    run_ranks(pretrain, 1, settings(folder), folder=folder)
    shutil.rmtree(folder / "run" / "tensorboard")
    return folder


# --------------------------------------------------------------------------------------------------
# damage


STRANGE = [
    None,
    True,
    -1,
    0,
    7,
    2**63,
    2**70,
    1.5,
    1e308,
    "",
    ".",
    "..",
    "../../outside",
    "/etc/hostname",
    "a\0b",
    "x" * 5000,
    [],
    {},
    [[]],
    "F32",
    "rank-00001.safetensors",
]


def damage_bytes(path, dice):
    content = bytearray(path.read_bytes())
    kind = dice.choice(["flip", "cut", "append", "zero", "copy", "empty", "front"])
    if kind == "flip" and content:
        for _ in range(dice.choice([1, 1, 5, 50])):
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    elif kind == "front" and content:
        content[dice.randrange(min(len(content), 300))] = dice.randrange(256)
    elif kind == "cut":
        del content[dice.randint(0, len(content)) :]
    elif kind == "append":
        content += dice.randbytes(dice.choice([1, 8, 4096]))
    elif kind == "empty":
        content.clear()
    else:
        start, stop = sorted(dice.randint(0, len(content)) for _ in range(2))
        content[start:stop] = bytes(stop - start) if kind == "zero" else content[start:stop] * 2
    path.write_bytes(content)


def damage_json(path, dice):
    """Changes, drops, duplicates or renames a random value of the JSON."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return damage_bytes(path, dice)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    if not places:
        return None
    node, key = dice.choice(places)
    kind = dice.choice(["strange", "strange", "drop", "other", "rename"])
    if kind == "strange":
        node[key] = dice.choice(STRANGE)
    elif kind == "drop":
        del node[key]
    elif kind == "other":
        other, place = dice.choice(places)
        node[key] = (
            json.loads(json.dumps(other[place]))
            if (place in other if isinstance(other, dict) else place < len(other))
            else None
        )
    elif isinstance(node, dict):
        node[str(dice.choice(STRANGE))] = node.pop(key)
    return path.write_text(json.dumps(value))


def damage_file(path, dice):
    """Deletes, copies or replaces a file."""
    kind = dice.choice(["gone", "swap", "folder", "fifo", "loop", "copy"])
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    if kind == "copy":
        shutil.copy(
            path,
            path.with_name(
                "model-00009-of-00009.safetensors"
                if path.suffix == ".safetensors"
                else "extra.json"
            ),
        )
    elif kind == "swap" and others:
        path.write_bytes(dice.choice(others).read_bytes())
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path)


def damage(folder, dice):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(dice.choice([1, 1, 1, 2])):
        path = dice.choice(files)
        if path.is_file():
            way = dice.choice(
                [damage_json, damage_json, damage_bytes, damage_file]
                if path.suffix == ".json"
                else [damage_bytes, damage_bytes, damage_file]
            )
            way(path, dice)


def update_manifest(folder):
    """Makes the manifest match the files, so that the code after its check is reached."""
    records = [
        manifest.make_record(folder, path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != manifest.MANIFEST
    ]
    text = json.dumps({"format": manifest.FORMAT, "files": [entry._asdict() for entry in records]})
    if (folder / manifest.MANIFEST).is_file():
        (folder / manifest.MANIFEST).write_text(text)


# --------------------------------------------------------------------------------------------------
# reading


def read_model(folder):
    tensors = HFFolder(folder)
    for name in tensors.names():
        tensors.read(name)


def read_run(folder):
    """Does what a resume and a start from the folder do, without ranks."""
    config = configuration.from_dict(settings(folder))
    architecture = read_config(load_hf_config(MODEL))
    path, _ = choose_start(config, hashes=True)
    if path is not None:
        run = describe_run(config, architecture, data_size=1)
        resume.check(path, run)
        resume.describe_differences(path, run)
        optimizer = OptimizerState(path / "optimizer")
        for spec, parameter in parameters(
            build_stage(config, architecture, make_mesh(0, connect=False), "cpu")
        ):
            states = {
                state: torch.zeros(parameter.numel())
                for state in ("master", "exp_avg", "exp_avg_sq")
            }
            optimizer.load(Fragment(spec, parameter, tuple(parameter.shape), 0, states))
    for path in sorted((folder / "run" / "checkpoints").glob("step-*")):
        own = read_config(load_hf_config(str(path)))
        pretrained = Pretrained(path, own)
        pretrained.check(parameter_shapes(own))
        pretrained.load_weights(build_stage(config, own, make_mesh(0, connect=False), "cpu"), 0)


def fail_on_timeout(number, frame):
    raise AssertionError("reading has not ended")


@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_damaged_folder_is_refused_or_read(block, bases, tmp_path):
    outside = {path: path.read_bytes() for path in sorted(bases.rglob("*")) if path.is_file()}
    refused = 0
    before = signal.signal(signal.SIGALRM, fail_on_timeout)
    try:
        for case in range(CASES):
            seed = block * CASES + case
            dice, folder = random.Random(seed), tmp_path / "case" / str(seed)
            kind = dice.choice([*KINDS, "trap", *["run"] * 6])
            shutil.copytree(bases / kind, folder / kind)
            shutil.copy(bases / "tokens.idx", folder)
            damage(folder / kind, dice)
            if kind == "run" and dice.random() < 0.6:
                for path in (folder / "run" / "checkpoints").glob("step-*"):
                    update_manifest(path)
            signal.alarm(240)
            try:
                read_run(folder) if kind == "run" else read_model(folder / kind)
            except (CheckpointError, ConfigError):
                refused += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {kind}") from error
            finally:
                signal.alarm(0)
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert CASES // 4 < refused < CASES, "some are refused, and some damage shows only in hashes"
    assert not (bases / "trap ran").exists()
    assert {
        path: path.read_bytes() for path in sorted(bases.rglob("*")) if path.is_file()
    } == outside
    assert list((tmp_path / "case").iterdir()) == []
