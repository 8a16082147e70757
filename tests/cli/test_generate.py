"""`megatrain generate` gives the text of transformers, also if the model exceeds the memory."""

import pytest
import torch
from helpers.tiny_folders import LLAMA, make_folder

from megatrain.__main__ import main
from megatrain.cli import generate as generate_command
from megatrain.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights and a byte-level tokenizer."""
    root = tmp_path_factory.mktemp("generating")
    (root / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 3)
    tokenizer = train_tokenizer([root / "text.txt"], vocab_size=270, output=root / "model")
    make_folder(
        root / "model",
        {**LLAMA, "vocab_size": tokenizer.vocab_size, "eos_token_id": None, "bos_token_id": None},
        shard="1GB",
    )
    return root / "model"


def generate(capsys, folder, *words):
    assert (
        main(["generate", str(folder), "--prompt", "one two", "--max-new-tokens", "12", *words])
        == 0
    )
    return capsys.readouterr().out


def test_greedy_text_equals_transformers(folder, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = generate(capsys, folder, "--temperature", "0")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    tokens = tokenizer("one two", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    prompt = tokens.shape[1]
    with torch.inference_mode():
        for _ in range(12):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    assert output.startswith("one two")
    assert output.rstrip("\n") == tokenizer.decode(tokens[0], skip_special_tokens=True).rstrip("\n")
    assert tokens.shape[1] == prompt + 12


def test_seed_determines_the_text(folder, capsys):
    one = generate(capsys, folder, "--seed", "1")
    assert generate(capsys, folder, "--seed", "1") == one
    assert generate(capsys, folder, "--seed", "2") != one
    assert generate(capsys, folder, "--seed", "2", "--top-k", "1") == generate(
        capsys, folder, "--temperature", "0"
    )


def test_model_larger_than_memory_is_read_from_disk(folder, capsys, monkeypatch):
    plain = generate(capsys, folder, "--temperature", "0")
    loaded, load = [], generate_command.load_model
    monkeypatch.setattr(
        generate_command,
        "load_model",
        lambda *args, **more: loaded.append(load(*args, **more)) or loaded[-1],
    )
    assert generate(capsys, folder, "--temperature", "0", "--memory", "60KB") == plain
    assert "disk" in loaded[0].hf_device_map.values()
    assert generate(capsys, folder, "--temperature", "0", "--memory", "1GB") == plain
    assert not hasattr(loaded[1], "hf_device_map")


BAD = {
    "exceeds the model's 64 positions after a prompt of": ["--max-new-tokens", "64"],
    "has no chat template; leave --chat out": ["--chat"],
    "/nowhere does not exist; give the folder of a tokenizer": ["--tokenizer", "/nowhere"],
}


@pytest.mark.parametrize("sentence", BAD)
def test_invalid_requests_are_rejected(sentence, folder, capsys):
    assert main(["generate", str(folder), "--prompt", "one", *BAD[sentence]]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--temperature", "-1"], ["--top-p", "2"], ["--top-k", "0"], ["--max-new-tokens", "x"]],
)
def test_options_out_of_range(words, folder, capsys):
    with pytest.raises(SystemExit):
        main(["generate", str(folder), "--prompt", "one", *words])
    assert words[0] in capsys.readouterr().err


def test_damaged_checkpoint(folder, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:5000])
    assert main(["generate", str(copy), "--prompt", "one"]) == 1
    assert "is truncated or corrupt" in capsys.readouterr().err
