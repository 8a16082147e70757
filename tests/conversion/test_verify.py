"""A conversion whose bytes or logits differ from its source is never published."""

from __future__ import annotations

import errno
import json
import os

import pytest
from helpers.tiny_folders import LLAMA, edit_tensors, error_of, make_folder, tensors_of, to_hf

from megatrain.conversion import convert as convert_module
from megatrain.conversion import verify, writer


@pytest.fixture
def source(tmp_path):
    """A Llama folder that a test may damage."""
    make_folder(tmp_path / "source", LLAMA)
    return tmp_path / "source"


def test_config_with_other_logits_is_not_published(source, tmp_path, capfd, monkeypatch):
    write_config = convert_module.write_config

    def write(folder, *args, **options):
        written = write_config(folder, *args, **options)
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 100.0
        (folder / "config.json").write_text(json.dumps(config))
        return written

    monkeypatch.setattr(convert_module, "write_config", write)
    assert "the logits of" in error_of(capfd, source, tmp_path / "out", "--to", "hf")
    assert to_hf(source, tmp_path / "out", "--no-verify") == 0


def test_flipped_bit_on_disk_is_found(source, tmp_path, capfd, monkeypatch):
    write_all, count = writer._write_all, []

    def flip(handle, view):
        count.append(1)
        content = bytearray(view)
        content[len(content) // 2] ^= len(count) == 5
        write_all(handle, memoryview(content))

    monkeypatch.setattr(writer, "_write_all", flip)
    monkeypatch.setattr(writer, "_can_copy", lambda *args: False)
    assert "has other bytes than were written" in error_of(
        capfd, source, tmp_path / "out", "--to", "hf"
    )


def test_copy_from_a_wrong_offset_is_found(source, tmp_path, capfd, monkeypatch):
    copy = writer._copy_span
    monkeypatch.setattr(
        writer,
        "_copy_span",
        lambda span, handle: copy(span._replace(start=span.start - 4, stop=span.stop - 4), handle),
    )
    assert "has other bytes than were written" in error_of(
        capfd, source, tmp_path / "out", "--to", "hf"
    )


@pytest.mark.parametrize("how", ["other disks", "unsupported"])
def test_same_bytes_without_copy_file_range(how, source, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if how == "unsupported":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    else:
        monkeypatch.setattr(writer, "_can_copy", lambda *args: False)
    assert to_hf(source, tmp_path / "out") == 0
    assert tensors_of(tmp_path / "out") == tensors_of(source)


def test_wrongly_read_tensor_is_found_by_the_logits(source, tmp_path, capfd, monkeypatch):
    """The hashes are those of the wrong values: only a second implementation finds it."""
    read = verify.read_parameter
    monkeypatch.setattr(
        verify,
        "read_parameter",
        lambda tensors, spec, rows=None: (
            read(tensors, spec, rows).flip(0)
            if spec.name.endswith("0.self_attn.q_proj.weight")
            else read(tensors, spec, rows)
        ),
    )
    assert "the logits of" in error_of(capfd, source, tmp_path / "out", "--to", "hf")


def test_model_without_finite_logits_is_rejected(source, tmp_path, capfd):
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert "own logits are not finite; --no-verify converts it without a comparison" in error_of(
        capfd, source, tmp_path / "out", "--to", "hf"
    )
    assert to_hf(source, tmp_path / "out", "--no-verify") == 0
