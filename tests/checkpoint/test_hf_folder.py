"""Folders of tensors are read by name and slice, and errors name their damage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.model_folders import KINDS, SHARDS, TENSORS, write
from safetensors import safe_open
from safetensors.torch import save_file

from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.tensor_io import SafetensorsFile, write_tensors
from megatrain.errors import CheckpointError


@pytest.mark.parametrize("kind", KINDS)
def test_reads_tensors_and_slices(kind, tmp_path):
    tensors = HFFolder(write(tmp_path / "model", kind))
    assert set(tensors.names()) == set(TENSORS)
    for name, wanted in TENSORS.items():
        read = tensors.read(name)
        assert (tensors.shape(name), tensors.dtype(name)) == (tuple(wanted.shape), wanted.dtype)
        assert read.dtype == wanted.dtype
        assert torch.equal(read, wanted)
    before = tensors.bytes_read
    part = tensors.read("b.weight", (slice(1, 3), slice(0, 3), slice(2, 4)))
    assert torch.equal(part, TENSORS["b.weight"][1:3, :, 2:4])
    assert part.is_contiguous()
    assert tensors.bytes_read - before == 2 * 3 * 2 * 2
    target = torch.empty(2, 3, 2, dtype=torch.float64)
    tensors.copy("b.weight", (slice(1, 3), slice(0, 3), slice(2, 4)), to=target)
    assert torch.equal(target, part.double())
    assert tensors.bytes_read - before == 2 * 2 * 3 * 2 * 2
    part.zero_()
    assert torch.equal(tensors.read("b.weight"), TENSORS["b.weight"])
    with pytest.raises(CheckpointError, match=r"has no tensor nobody\.weight"):
        tensors.read("nobody.weight")


def test_reads_what_safetensors_reads(tmp_path):
    folder = write(tmp_path / "model", "safetensors")
    ours = SafetensorsFile(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as theirs:
        assert set(ours.names()) == set(theirs.keys())
        assert ours.metadata == theirs.metadata()
        assert all(torch.equal(ours.view(name), theirs.get_tensor(name)) for name in ours.names())


def test_safetensors_reads_what_is_written(tmp_path):
    done = write_tensors(tmp_path / "file", TENSORS, metadata={"format": "pt"})
    content = (tmp_path / "file").read_bytes()
    assert (done.size, done.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with safe_open(tmp_path / "file", framework="pt") as theirs:
        assert theirs.metadata() == {"format": "pt"}
        assert set(theirs.keys()) == set(TENSORS)
        assert all(torch.equal(theirs.get_tensor(name), tensor) for name, tensor in TENSORS.items())


def test_tensors_that_are_not_aligned(tmp_path):
    content = raw(
        {
            "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "y": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        },
        b"\1" + struct.pack("<ff", 1.5, 2.5),
    )
    (tmp_path / "model.safetensors").write_bytes(content)
    assert HFFolder(tmp_path).read("y").tolist() == [1.5, 2.5]


def raw(header, data):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def edit_index(change):
    def damage(folder):
        (path,) = folder.glob("*.index.json")
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def replace(name, header, data=b""):
    return lambda folder: (folder / name).write_bytes(raw(header, data))


ONE, TWO = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGES = {
    "is missing or not a regular file": lambda folder: (folder / TWO).unlink(),
    "00002-of-00003.safetensors is missing": lambda folder: (
        (folder / TWO).unlink(),
        os.mkfifo(folder / TWO),
    ),
    "is truncated or corrupt .*incomplete metadata": lambda folder: os.truncate(
        folder / ONE, (folder / ONE).stat().st_size - 1
    ),
    "is truncated or corrupt .*[Ii]nvalid header length": lambda folder: os.truncate(
        folder / ONE, 50
    ),
    "is truncated or corrupt .*header too small": lambda folder: os.truncate(folder / ONE, 3),
    "incomplete metadata, file not fully covered": lambda folder: (folder / ONE).write_bytes(
        (folder / ONE).read_bytes() + b"\0"
    ),
    "header too large": lambda folder: (folder / ONE).write_bytes(
        b"\xff" * 8 + (folder / ONE).read_bytes()[8:]
    ),
    "in '../other.safetensors', which is not the name of a file": edit_index(
        lambda m: m.update({"a.bias": "../other.safetensors"})
    ),
    "in '/etc/passwd', which is not the name of a file": edit_index(
        lambda m: m.update({"a.bias": "/etc/passwd"})
    ),
    r"in '\.\.', which": edit_index(lambda m: m.update({"a.bias": ".."})),
    "in '5', which": edit_index(lambda m: m.update({"a.bias": 5})),
    r"contains a\.bias, which model\.safetensors\.index\.json does not list": edit_index(
        lambda m: m.pop("a.bias")
    ),
    "lacks d.weight, which": edit_index(lambda m: m.update({"d.weight": ONE})),
    "contains model-00003-of-00003.safetensors, which": edit_index(
        lambda m: [m.pop(name) for name in SHARDS[2]]
    ),
    "weight_map must map names to files": edit_index(lambda m: m.clear()),
    "contains a.weight twice": lambda folder: save_file(
        {**SHARDS[1], "a.weight": TENSORS["a.weight"]}, folder / TWO
    ),
    "not a readable index": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": '
    ),
    "a.bias occurs twice": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a.bias": "x", "a.bias": "y"}}'
    ),
    "possibly of different models": lambda folder: save_file(TENSORS, folder / "model.safetensors"),
    "contains no model; expected one of model.safetensors, ": lambda folder: (
        folder / "model.safetensors.index.json"
    ).unlink(),
    r"x occurs twice": replace(
        ONE,
        '{"x": {"dtype":"F32","shape":[],"data_offsets":[0,4]}, '
        '"x": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "invalid shape, data type, or offset": replace(ONE, {"x": {**F32, "shape": [3]}}, b"12345678"),
    "invalid value: integer `-2`": replace(ONE, {"x": {**F32, "shape": [-2]}}, b"12345678"),
    "invalid offset for tensor `[xy]`": replace(ONE, {"x": F32, "y": F32}, b"12345678"),
    "invalid offset for tensor `x`": replace(
        ONE, {"x": {**F32, "data_offsets": [4, 12]}}, b"123456789012"
    ),
    "unknown variant `F5`": replace(ONE, {"x": {**F32, "dtype": "F5"}}, b"12345678"),
    "invalid JSON in header: invalid type: sequence": replace(ONE, "[" * 100_000),
    "invalid type: integer": replace(ONE, "5"),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_errors_name_the_damage_of_a_folder(sentence, tmp_path):
    folder = write(tmp_path / "model", "safetensors shards")
    DAMAGES[sentence](folder)
    with pytest.raises(CheckpointError, match=sentence):
        HFFolder(folder)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_file_is_refused_and_not_run(zipped, tmp_path):
    proof = tmp_path / "trap ran"
    folder = write(tmp_path / "model", "bin")
    torch.save(
        {"a": torch.zeros(2), "b": Trap(proof)},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match="contains more than tensors, which could run code"):
        HFFolder(folder)
    assert not proof.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert proof.exists(), "the trap works"


def test_bin_files_with_other_objects_are_refused(tmp_path):
    folder = write(tmp_path / "model", "bin")
    cases = {
        "contains a list; it must contain a state dict": [torch.zeros(2)],
        "n is not a plain tensor": {"n": {"x": torch.zeros(2)}},
        "s is not a plain": {"s": torch.zeros(3, 3).to_sparse()},
        "5 is not a plain": {5: torch.zeros(2)},
        "e is not a plain": {"e": torch.zeros(1).expand(10**12)},
    }
    for sentence, content in cases.items():
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=sentence):
            HFFolder(folder)


def test_a_compressed_bin_file_is_refused(tmp_path):
    folder = write(tmp_path / "model", "bin")
    plain = folder / "pytorch_model.bin"
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    shutil.move(tmp_path / "packed", plain)
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save does not do"):
        HFFolder(folder)


def test_symbolic_links_are_followed(tmp_path):
    """The cache of Hugging Face's hub consists of links."""
    folder = write(tmp_path / "model", "safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert torch.equal(HFFolder(folder).read("a.weight"), TENSORS["a.weight"])


def test_a_file_truncated_during_reading_is_an_error(tmp_path):
    tensors = HFFolder(write(tmp_path / "model", "safetensors"))
    os.truncate(tmp_path / "model" / "model.safetensors", 500)
    with pytest.raises(CheckpointError, match="was truncated while it was read"):
        [tensors.read(name) for name in tensors.names()]
