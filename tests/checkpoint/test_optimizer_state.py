"""Pieces that one layout wrote fill another's, each rank reading its own elements and no more."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from megatrain.checkpoint.optimizer_state import (
    OptimizerState,
    flat_shard_of,
    snapshot,
    write_index,
)
from megatrain.checkpoint.tensor_io import write_tensors
from megatrain.distributed.sharding import ShardSpec
from megatrain.errors import CheckpointError
from megatrain.optim.zero import Fragment

STATES = ("master", "exp_avg")
ROWS, COLUMNS = 12, 10


def whole(name, state):
    return (
        torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
        + 1000 * STATES.index(state)
        + 5000 * (name == "y")
    )


def fragments(tensor, replicas, *, empty=False, states=STATES):
    """By rank: of x split by rows with padding and y by columns over `tensor` ranks, and ZeRO over `replicas`."""
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
        part = s.take(whole(s.name, state if state in STATES else "master"))
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
        files[name] = snapshot(held).pieces
        write_tensors(folder / name, snapshot(held).tensors)
    write_index(folder, files, STATES)
    return folder


@pytest.mark.parametrize("before", [(1, 1), (2, 1), (2, 3), (5, 2)])
@pytest.mark.parametrize("after", [(1, 1), (2, 2), (5, 1), (1, 3)])
def test_any_layouts_pieces_fill_any_others(before, after, tmp_path):
    folder = write(tmp_path / "optimizer", fragments(*before))
    for mine, wanted in zip(fragments(*after, empty=True), fragments(*after), strict=True):
        opened = OptimizerState(folder)
        for fragment, expected in zip(mine, wanted, strict=True):
            opened.fill(fragment)
            for state in STATES:
                got, right = fragment.tensors[state], expected.tensors[state]
                padding = got == -7
                assert torch.equal(got[~padding], right[~padding])
                assert not right[padding].any(), "only padding is left as it was"
        real = sum(int((f.tensors["master"] != -7).sum()) for f in mine)
        assert opened.bytes_read == real * 4 * len(STATES)


def test_files_without_anything_for_a_rank_are_not_opened(tmp_path):
    folder = write(tmp_path / "optimizer", [[held] for held in fragments(1, 1)[0]])
    (folder / "rank-00001.safetensors").unlink()
    x, y = fragments(1, 1, empty=True)[0]
    OptimizerState(folder).fill(x)
    assert torch.equal(x.tensors["exp_avg"].view(ROWS + 1, COLUMNS)[:ROWS], whole("x", "exp_avg"))
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is missing"):
        OptimizerState(folder).fill(y)


def test_the_same_layout_is_one_copy_a_tensor(tmp_path, monkeypatch):
    folder = write(tmp_path / "optimizer", fragments(2, 3))
    from megatrain.checkpoint import optimizer_state

    counts = []
    monkeypatch.setattr(
        optimizer_state, "_copy", lambda source, target, copies: counts.append(copies.length.size)
    )
    opened = OptimizerState(folder)
    for held in fragments(2, 3):
        for fragment in held:
            opened.fill(fragment)
    assert set(counts) == {1}


MEMORY = """
import re, sys, torch
from pathlib import Path
from megatrain.checkpoint.optimizer_state import OptimizerState
from megatrain.optim.zero import Fragment
from megatrain.distributed.sharding import ShardSpec
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
mine = [Fragment(ShardSpec(f"t{i}", (1024, 1024), 1, 512, 256), None, (1024, 256), 0, {"master": torch.ones(1024 * 256)}) for i in range(24)]
try: open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the start
except OSError: pass
before = peak()
folder = OptimizerState(Path(sys.argv[1]))
for fragment in mine: folder.fill(fragment)
assert all(f.tensors["master"][5] == 1029 for f in mine) and folder.bytes_read == 24 << 20
print(peak() - before)
"""


def test_memory_beside_a_ranks_own_share_is_that_of_one_tensor(tmp_path):
    """A quarter of 96 MiB is read out of the middle of every row, over the pages of all of it; the limit is 1.2 times the share and a tensor."""
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
    write_tensors(folder / "rank-00000.safetensors", snapshot(held).tensors)
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
    assert int(done.stdout) < 0.2 * share + tensor, "the share itself was there before"


def edit(change):
    def damage(folder):
        index = json.loads((folder / "index.json").read_text())
        change(index)
        (folder / "index.json").write_text(json.dumps(index))

    return damage


def piece(number, value):
    return edit(lambda index: index["tensors"]["x"]["pieces"][0].__setitem__(number, value))


DAMAGES = {
    "has no index.json: the checkpoint was written before": lambda folder: (
        folder / "index.json"
    ).unlink(),
    "index.json is damaged .JSONDecodeError": lambda folder: (folder / "index.json").write_text(
        "{"
    ),
    "index.json is damaged .KeyError": edit(lambda index: index.pop("files")),
    r"index.json is damaged .* '\.\./x' is not the name of a file": edit(
        lambda index: index["files"].__setitem__(0, "../x")
    ),
    "index.json is damaged .* a piece is in a file that is not listed": piece(0, 9),
    "index.json is damaged .* a piece is not inside its tensor": piece(3, 400),
    "index.json is damaged .* -1 is no natural number": piece(2, -1),
    "index.json is damaged .* 1.5 is no natural number": piece(7, 1.5),
    "index.json is damaged .* 2767011.* is no natural number": piece(6, 1 << 61),
    "holds nothing of x": edit(lambda index: index["tensors"].pop("x")),
    "does not hold each element of x once": edit(
        lambda index: index["tensors"]["x"]["pieces"].pop()
    ),
    "does not hold each element of x once$": edit(
        lambda index: index["tensors"]["x"]["pieces"].append(index["tensors"]["x"]["pieces"][0])
    ),
    r"holds x as \(12, 11\) and the model has it as \(12, 10\)": edit(
        lambda index: index["tensors"]["x"].update(shape=[12, 11])
    ),
    r"rank-00001.safetensors does not hold x\[0:7\]/master, as index.json says": piece(0, 1),
    "keeps master, momentum of each weight and this run keeps master, exp_avg": edit(
        lambda index: index.update(states=["master", "momentum"])
    ),
    "cut short": lambda folder: (folder / "rank-00000.safetensors").write_bytes(
        (folder / "rank-00000.safetensors").read_bytes()[:-9]
    ),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_says_what_is_wrong(sentence, tmp_path):
    folder = write(tmp_path / "optimizer", fragments(2, 1))
    DAMAGES[sentence](folder)
    with pytest.raises(CheckpointError, match=sentence):
        OptimizerState(folder).fill(fragments(1, 1, empty=True)[0][0])


def test_a_piece_that_is_not_of_the_size_in_the_index(tmp_path):
    folder = write(tmp_path / "optimizer", fragments(2, 1))
    edit(lambda index: index["tensors"]["x"]["pieces"][0].__setitem__(8, 71))(folder)
    with pytest.raises(
        CheckpointError,
        match=r"holds x\[0:7\]/master as torch\.float32 \(70,\), not as index\.json says",
    ):
        OptimizerState(folder).fill(fragments(2, 1, empty=True)[0][0])
