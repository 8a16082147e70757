"""Conversions: written tensors equal the source, are verified, and appear atomically."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkout_paths import TOOLS
from helpers.tiny_folders import (
    GPT2,
    LLAMA,
    convert,
    edit_tensors,
    error_of,
    make_folder,
    tensors_of,
    to_hf,
)
from safetensors.torch import load_file

from megatrain.cli.convert import parse_size
from megatrain.conversion import convert as convert_module
from megatrain.conversion import writer
from megatrain.errors import CheckpointError

TIED = {**LLAMA, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each model, in several shards."""
    root = tmp_path_factory.mktemp("sources")
    return {
        name: (make_folder(root / name, fields), root / name)[1]
        for name, fields in {"llama": LLAMA, "tied": TIED, "gpt2": GPT2}.items()
    }


@pytest.fixture
def source(folders, tmp_path):
    """A copy of the Llama folder that a test may damage."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "source"))


def test_python_function(folders, tmp_path, capfd):
    result = convert_module.convert(str(folders["llama"]), tmp_path / "out", dtype="bf16", to="hf")
    assert result.target == tmp_path / "out"
    assert result.sha256.keys() == tensors_of(result.target).keys()
    assert result.verification.max_logit_difference < 1e-5 < result.verification.rounding_difference
    assert capfd.readouterr().out == ""
    with pytest.raises(CheckpointError, match="is not empty"):
        convert_module.convert(folders["llama"], tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_one_file_has_the_same_bytes(name, folders, tmp_path, capfd):
    assert to_hf(folders[name], tmp_path / "out", "--max-shard-size", "1TB") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == [
        "model.safetensors"
    ]
    assert tensors_of(tmp_path / "out") == tensors_of(folders[name])
    output = capfd.readouterr().out
    assert ": Hugging Face folder (" in output
    assert "memory    at most 1.00 GiB; the largest tensor is" in output
    assert "written   0.00 GB at" in output
    figures = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert figures["proof"]["max_logit_difference"] <= 1e-5
    assert (
        figures["proof"]["tensors"]
        == len(tensors_of(folders[name]))
        == len(figures["sha256_of_tensors"])
    )
    assert (figures["proof"]["source_computed_by"], figures["proof"]["target_computed_by"]) == (
        "our layers",
        "transformers",
    )


def test_transformers_loads_it_with_the_same_logits(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    assert to_hf(folders["tied"], tmp_path / "out", "--max-shard-size", "30KB") == 0
    one = AutoModelForCausalLM.from_pretrained(folders["tied"]).eval()
    two, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        assert torch.equal(one(tokens).logits, two.eval()(tokens).logits)


def test_shards_and_their_index(folders, tmp_path):
    assert to_hf(folders["llama"], tmp_path / "out", "--max-shard-size", "25KB") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert {name: path.name for path in shards for name in load_file(path)} == index["weight_map"]
    for path in shards:
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 25_000
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in shards for tensor in load_file(path).values()
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lower_dtype_rounds_to_nearest_and_reports_the_difference(dtype, folders, tmp_path, capfd):
    assert to_hf(folders["gpt2"], tmp_path / "out", "--dtype", dtype) == 0
    output = capfd.readouterr().out
    assert (
        "rounding changes a weight by at most "
        f"{'0.002' if dtype == 'bf16' else '0.00024'} of its value" in output
    )
    assert "rounding changed logits by at most" in output
    to = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    before = {
        name: tensor
        for path in folders["gpt2"].glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, before[name].to(to))
    figures = json.loads((tmp_path / "out" / "conversion.json").read_text())["proof"]
    assert figures["max_logit_difference"] <= 1e-5 < figures["rounding_difference"] < 0.1
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
        == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    )


def test_values_beyond_fp16_are_rejected(source, tmp_path, capfd):
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].fill_(7e4))
    assert (
        "model.norm.weight contains 7e+04, which exceeds the range of fp16; "
        "use --dtype bf16 or fp32"
        in error_of(capfd, source, tmp_path / "out", "--to", "hf", "--dtype", "fp16")
    )


def test_bin_files_without_prefix_and_with_buffers(folders, tmp_path):
    """The Hugging Face hub's GPT-2 has this format."""
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(folders["gpt2"] / "config.json", old)
    whole = {
        name: tensor
        for path in folders["gpt2"].glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    state = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    state |= {
        "h.0.attn.bias": torch.ones(1, 1, 64, 64).tril(),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    torch.save({**state, "lm_head.weight": state["wte.weight"]}, old / "pytorch_model.bin")
    assert to_hf(old, tmp_path / "out") == 0
    assert tensors_of(tmp_path / "out") == tensors_of(folders["gpt2"])


def test_tokenizer_is_copied(source, tmp_path):
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "notes.bin").write_text("no")
    (source / "vocab.txt").write_text("x")
    (source / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    assert to_hf(source, tmp_path / "out") == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.3
    )
    assert not (tmp_path / "out" / "notes.bin").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"b": 1}')
    assert to_hf(source, tmp_path / "again", "--tokenizer", other) == 0
    assert (tmp_path / "again" / "tokenizer.json").read_text() == '{"b": 1}'
    assert not (tmp_path / "again" / "vocab.txt").exists()


# The target is complete or does not exist.


def test_killed_conversion_leaves_no_target_and_the_next_one_cleans_up(source, tmp_path):
    code = (
        "import os, sys\nfrom megatrain.conversion import writer\n"
        "from megatrain.__main__ import main\n"
        "write, count = writer._write_all, []\n"
        "def die(*args):\n"
        "    count.append(1)\n    write(*args)\n    len(count) == 9 and os.kill(os.getpid(), 9)\n"
        "writer._write_all, writer._can_copy = die, lambda *args: False\n"
        "main(['convert', *sys.argv[1:]])"
    )
    arguments = [str(source), str(tmp_path / "out"), "--to", "hf"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    left = tmp_path / ".converting-out"
    assert (left / "model.safetensors").stat().st_size > 0
    (left / "more").mkdir()
    assert convert(*arguments) == 0
    assert not left.exists()
    assert tensors_of(tmp_path / "out") == tensors_of(source)
    assert not (tmp_path / "out" / "more").exists()


def test_second_conversion_to_the_same_folder_fails(source, tmp_path, capfd):
    hidden = tmp_path / ".converting-out"
    hidden.mkdir()
    (hidden / "theirs").write_text("x")
    handle = os.open(hidden, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert to_hf(source, tmp_path / "out") == 1
    finally:
        os.close(handle)
    assert "is being written by another conversion" in capfd.readouterr().err
    assert (hidden / "theirs").exists()


def test_full_disk_leaves_no_target(source, tmp_path, capfd, monkeypatch):
    write_all, count = writer._write_all, []

    def full(handle, view):
        count.append(1)
        if len(count) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(handle, view)

    monkeypatch.setattr(writer, "_write_all", full)
    monkeypatch.setattr(writer, "_can_copy", lambda *args: False)
    assert "cannot be written: No space left on device; nothing was published" in error_of(
        capfd, source, tmp_path / "out", "--to", "hf"
    )


def test_free_space_is_checked_first(source, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5000})())
    monkeypatch.setattr(
        convert_module, "write_model", lambda *args, **more: pytest.fail("something was written")
    )
    assert "requires 0.000 GB, but its disk has 0.000 GB free; nothing was written" in error_of(
        capfd, source, tmp_path / "out", "--to", "hf"
    )


def test_nonempty_target_is_rejected(source, tmp_path, capfd):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("x")
    assert f"{target} is not empty; give a new folder" in error_of(
        capfd, source, target, "--to", "hf"
    )
    (target / "mine").unlink()
    assert to_hf(source, target) == 0
    file = tmp_path / "file"
    file.write_text("x")
    assert "exists and is not a folder" in error_of(capfd, source, file, "--to", "hf")


# Incomplete and damaged sources.


def set_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def untie(folder):
    set_config(folder, tie_word_embeddings=True)


DAMAGES = {
    "lacks model.layers.1.mlp.up_proj.weight": lambda folder: edit_tensors(
        folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")
    ),
    "contains model.extra, which the llama of its config does not have": lambda folder: (
        edit_tensors(folder, lambda t: t.update({"model.extra": torch.ones(2)}))
    ),
    "of shape (48, 32), but its config requires (64, 32)": lambda folder: set_config(
        folder, intermediate_size=64
    ),
    "lacks model.layers.2.": lambda folder: set_config(folder, num_hidden_layers=3),
    "contains model.layers.1.": lambda folder: set_config(folder, num_hidden_layers=1),
    "contains lm_head.weight with other values than the embedding, but its config ties them": untie,
    "model.quantization_config": lambda folder: set_config(
        folder, quantization_config={"quant_method": "fp8"}
    ),
    "is a classifier, but only language models are converted": lambda folder: set_config(
        folder, architectures=["LlamaForSequenceClassification"], pad_token_id=0
    ),
    "model.model_type=": lambda folder: set_config(folder, model_type="opt"),
    "has no supported format": lambda folder: (folder / "config.json").unlink(),
    "contains no model": lambda folder: [path.unlink() for path in folder.glob("*.safetensors*")],
    "is missing or not a regular file": lambda folder: sorted(folder.glob("*.safetensors"))[
        0
    ].unlink(),
    "is truncated or corrupt": lambda folder: os.truncate(
        sorted(folder.glob("*.safetensors"))[0], 9000
    ),
    "has no manifest.json": lambda folder: (folder / "train_state.json").write_text("{}"),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_damaged_source_is_rejected(sentence, source, tmp_path, capfd):
    DAMAGES[sentence](source)
    assert sentence in error_of(capfd, source, tmp_path / "out", "--to", "hf")


def test_missing_source(tmp_path, capfd):
    assert "/nowhere does not exist" in error_of(capfd, "/nowhere", tmp_path / "out")


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "500MB", "1.5gb", "20K", "7", "1TB")] == [
        5 * 10**9,
        5 * 10**8,
        1_500_000_000,
        20_000,
        7,
        10**12,
    ]


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 apples", "nan"])
def test_invalid_sizes(text, capsys):
    with pytest.raises(SystemExit):
        convert("a", "b", f"--max-shard-size={text}")
    assert "must be" in capsys.readouterr().err


def test_tool_runs_the_command(source, tmp_path):
    done = subprocess.run(
        [sys.executable, TOOLS / "convert_checkpoint.py", source, source],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (
        1,
        f"error: {source} is not empty; give a new folder\n",
    )
