"""Pieces of one layout load on any other, and each rank reads only its own elements."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from megatrain.checkpoint.optimizer_state import (
    OptimizerState,
    copy_fragments,
    flat_shard_of,
    write_index,
)
from megatrain.checkpoint.tensor_io import write_tensors
from megatrain.distributed.sharding import ShardSpec
from megatrain.errors import CheckpointError
from megatrain.optim.zero_state import Fragment

STATES = ("master", "exp_avg")
ROWS, COLUMNS = 12, 10


def whole(name, state):
    return (
        torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
        + 1000 * STATES.index(state)
        + 5000 * (name == "y")
    )


def fragments(tensor, replicas, *, empty=False, states=STATES):
    """Returns the fragments of each rank.

    x is split by rows with padding and y by columns over `tensor` ranks; ZeRO over `replicas`.
    """
    ranks = []
    for rank in range(tensor):
        rows = -(-ROWS // tensor) + 1
        start = min(rank * rows, ROWS)
        x = ShardSpec("x", (ROWS, COLUMNS), 0, start, min(rows, ROWS - start))
        y = ShardSpec(
            "y", (ROWS, COLUMNS), 1, rank * COLUMNS // tensor, COLUMNS // tensor, transposed=True
        )
        for replica in range(replicas):
            ranks.append([_fragment(s, rows, replica, replicas, empty, states) for s in (x, y)])
    return ranks


def _fragment(s, rows, replica, replicas, empty, states):
    held = {}
    for state in states:
        part = s.shard(whole(s.name, state if state in STATES else "master"))
        part = (
            torch.cat([part, torch.zeros(rows - part.shape[0], COLUMNS)])
            if s.dim == 0
            else part.t()
        )
        flat = part.flatten()
        first, last = (flat.numel() * k // replicas for k in (replica, replica + 1))
        held[state] = torch.full_like(flat[first:last], -7) if empty else flat[first:last].clone()
    return Fragment(s, None, tuple(part.shape), first, held)


def write(folder, ranks):
    folder.mkdir()
    files = {}
    for number, held in enumerate(ranks):
        name = f"rank-{number:05d}.safetensors"
        files[name] = copy_fragments(held).pieces
        write_tensors(folder / name, copy_fragments(held).tensors)
    write_index(folder, files, STATES)
    return folder


@pytest.mark.parametrize("before", [(1, 1), (2, 1), (2, 3), (5, 2)])
@pytest.mark.parametrize("after", [(1, 1), (2, 2), (5, 1), (1, 3)])
def test_pieces_of_any_layout_load_on_any_other(before, after, tmp_path):
    folder = write(tmp_path / "optimizer", fragments(*before))
    for mine, wanted in zip(fragments(*after, empty=True), fragments(*after), strict=True):
        opened = OptimizerState(folder)
        for fragment, expected in zip(mine, wanted, strict=True):
            opened.load(fragment)
            for state in STATES:
                got, right = fragment.tensors[state], expected.tensors[state]
                padding = got == -7
                assert torch.equal(got[~padding], right[~padding])
                assert not right[padding].any(), "only padding is left as it was"
        real = sum(int((f.tensors["master"] != -7).sum()) for f in mine)
        assert opened.bytes_read == real * 4 * len(STATES)


def test_only_files_with_elements_of_the_rank_are_opened(tmp_path):
    folder = write(tmp_path / "optimizer", [[held] for held in fragments(1, 1)[0]])
    (folder / "rank-00001.safetensors").unlink()
    x, y = fragments(1, 1, empty=True)[0]
    OptimizerState(folder).load(x)
    assert torch.equal(x.tensors["exp_avg"].view(ROWS + 1, COLUMNS)[:ROWS], whole("x", "exp_avg"))
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is missing"):
        OptimizerState(folder).load(y)


def test_the_same_layout_takes_one_copy_per_tensor(tmp_path, monkeypatch):
    folder = write(tmp_path / "optimizer", fragments(2, 3))
    counts = []
    monkeypatch.setattr(
        OptimizerState, "_copy", lambda *arguments: counts.append(arguments[-1].length.size)
    )
    opened = OptimizerState(folder)
    for held in fragments(2, 3):
        for fragment in held:
            opened.load(fragment)
    assert set(counts) == {1}


MEMORY = """
import re, sys, torch
from pathlib import Path
from megatrain.checkpoint.optimizer_state import OptimizerState
from megatrain.optim.zero_state import Fragment
from megatrain.distributed.sharding import ShardSpec
def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024
def fragment(i):
    spec = ShardSpec(f"t{i}", (1024, 1024), 1, 512, 256)
    return Fragment(spec, None, (1024, 256), 0, {"master": torch.ones(1024 * 256)})
mine = [fragment(i) for i in range(24)]
try: open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the start
except OSError: pass
before = peak()
folder = OptimizerState(Path(sys.argv[1]))
for fragment in mine: folder.load(fragment)
assert all(f.tensors["master"][5] == 1029 for f in mine) and folder.bytes_read == 24 << 20
print(peak() - before)
"""


def test_loading_needs_memory_for_one_tensor_besides_the_fragments(tmp_path):
    """A quarter of each row is read, so that all 96 MiB of pages are touched.

    The limit is one tensor and a fifth of the rank's share.
    """
    held = [
        Fragment(
            ShardSpec(f"t{i}", (1024, 1024)),
            None,
            (1024, 1024),
            0,
            {"master": (torch.arange(1 << 20) % 1024 + 512).float()},
        )
        for i in range(24)
    ]
    folder = tmp_path / "optimizer"
    folder.mkdir()
    write_tensors(folder / "rank-00000.safetensors", copy_fragments(held).tensors)
    write_index(
        folder,
        {"rank-00000.safetensors": [flat_shard_of(fragment) for fragment in held]},
        ["master"],
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    share, tensor = 24 << 20, 4 << 20
    assert int(done.stdout) < 0.2 * share + tensor, "the fragments themselves are not counted"


def edit(change):
    def damage(folder):
        index = json.loads((folder / "index.json").read_text())
        change(index)
        (folder / "index.json").write_text(json.dumps(index))

    return damage


def piece(number, value):
    return edit(lambda index: index["tensors"]["x"]["pieces"][0].__setitem__(number, value))


DAMAGES = {
    "has no index.json: the checkpoint is of an old format": lambda folder: (
        folder / "index.json"
    ).unlink(),
    "index.json is damaged .JSONDecodeError": lambda folder: (folder / "index.json").write_text(
        "{"
    ),
    "index.json is damaged .KeyError": edit(lambda index: index.pop("files")),
    r"index.json is damaged .* '\.\./x' must be the name of a file": edit(
        lambda index: index["files"].__setitem__(0, "../x")
    ),
    "index.json is damaged .* a piece is in a file that is not listed": piece(0, 9),
    "index.json is damaged .* a piece is outside its tensor": piece(3, 400),
    "index.json is damaged .* -1 must be an integer of at least 0": piece(2, -1),
    "index.json is damaged .* 1.5 must be an integer of at least 0": piece(7, 1.5),
    "index.json is damaged .* 2767011.* must be an integer of at least 0": piece(6, 1 << 61),
    "lacks x": edit(lambda index: index["tensors"].pop("x")),
    "must contain each element of x once": edit(
        lambda index: index["tensors"]["x"]["pieces"].pop()
    ),
    "must contain each element of x once$": edit(
        lambda index: index["tensors"]["x"]["pieces"].append(index["tensors"]["x"]["pieces"][0])
    ),
    r"contains x of shape \(12, 11\) and the model\'s has \(12, 10\)": edit(
        lambda index: index["tensors"]["x"].update(shape=[12, 11])
    ),
    r"rank-00001.safetensors lacks x\[0:7\]/master, which index.json lists for it": piece(0, 1),
    "contains master, momentum of each weight and this run has master, exp_avg": edit(
        lambda index: index.update(states=["master", "momentum"])
    ),
    "is truncated or corrupt": lambda folder: (folder / "rank-00000.safetensors").write_bytes(
        (folder / "rank-00000.safetensors").read_bytes()[:-9]
    ),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_errors_name_the_damage(sentence, tmp_path):
    folder = write(tmp_path / "optimizer", fragments(2, 1))
    DAMAGES[sentence](folder)
    with pytest.raises(CheckpointError, match=sentence):
        OptimizerState(folder).load(fragments(1, 1, empty=True)[0][0])


def test_a_piece_of_another_size_than_in_the_index(tmp_path):
    folder = write(tmp_path / "optimizer", fragments(2, 1))
    edit(lambda index: index["tensors"]["x"]["pieces"][0].__setitem__(8, 71))(folder)
    with pytest.raises(
        CheckpointError,
        match=r"contains x\[0:7\]/master as torch\.float32 \(70,\), not as index\.json",
    ):
        OptimizerState(folder).load(fragments(2, 1, empty=True)[0][0])
