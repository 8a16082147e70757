"""Preference tuning as a command: metrics, reference log-probabilities, resume and merge."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers.chat_templates import CHATML
from helpers.networks import build, transformers_twin
from helpers.rank_pool import run_ranks
from helpers.training_runs import assert_same_run, finetune, metrics

from megatrain.__main__ import main
from megatrain.config import loader as configuration
from megatrain.data.tokenizer import train_tokenizer
from megatrain.errors import ConfigError
from megatrain.training.task_sft import SFTTask

VOCABULARY, LENGTH, PAIRS = 290, 56, 10
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "attention_dropout": 0.1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes pairs, a tokenizer with a template, and a model to start from."""
    folder = tmp_path_factory.mktemp("preference")
    (folder / "text.jsonl").write_text(json.dumps({"text": " ".join(WORDS * 5)}))
    train_tokenizer(
        [folder / "text.jsonl"],
        vocab_size=VOCABULARY,
        output=folder / "tokenizer",
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    (folder / "chatml.jinja").write_text(CHATML)
    for name, shift in (("train", 0), ("valid", 5)):
        records = [
            {
                "prompt": WORDS[(i + shift) % 9],
                "chosen": " ".join(WORDS[: i % 3 + 1]),
                "rejected": WORDS[-1 - i % 4],
            }
            for i in range(PAIRS)
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
    transformers_twin(MODEL, build(MODEL)).save_pretrained(folder / "base")
    return folder


def settings(files, output, **sections):
    raw = {
        "task": "dpo",
        "run": {"output_dir": str(output), "seed": 7},
        "parallel": {"pipeline": 2},
        "data": {
            "train": str(files / "train.jsonl"),
            "valid": str(files / "valid.jsonl"),
            "tokenizer": str(files / "tokenizer"),
            "chat_template": str(files / "chatml.jinja"),
            "sequence_length": LENGTH,
        },
        "train": {
            "steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "init_from": str(files / "base"),
        },
        "eval": {"every": 2, "batches": 2},
        "optimizer": {"lr": 2e-3},
        "lr_schedule": {"name": "constant"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return raw


@pytest.mark.parametrize(
    "lora", [{}, {"rank": 4, "dropout": 0.2, "dora": True}], ids=["whole", "dora"]
)
def test_resumed_run_is_bit_identical(lora, files, tmp_path):
    def run(folder, **train):
        run_ranks(
            finetune,
            2,
            settings(
                files, tmp_path / folder, lora=lora, train={**settings(files, "")["train"], **train}
            ),
            folder=tmp_path,
        )

    run("whole")
    run("parts", exit_after_step=2)
    run("parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=4)
    lines = metrics(tmp_path / "whole")
    steps, checks = (
        [line for line in lines if "loss" in line],
        [line for line in lines if "valid_loss" in line],
    )
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracy",
        "log_probs/chosen",
        "log_probs/rejected",
    ):
        assert all(name in line for line in steps)
        assert all(f"valid_{name}" in line for line in checks)
    if (
        not lora
    ):  # before the first step the model is its reference; with dropout only in evaluation
        assert checks[0]["valid_loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
    assert checks[0]["valid_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert checks[-1]["valid_rewards/margins"] > 0.01, "it learns to prefer"
    assert (tmp_path / "whole" / "ref_logprobs.safetensors").exists() == (not lora)


def test_merge_by_the_command(files, tmp_path, capsys, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    raw = settings(
        files,
        tmp_path / "run",
        lora={"rank": 4},
        train={**settings(files, "")["train"], "steps": 1},
        eval={"every": 0},
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert main(["finetune", str(file), "--merge"]) == 1
    assert "has no checkpoint to merge" in capsys.readouterr().err
    run_ranks(finetune, 2, raw, folder=tmp_path)
    with monkeypatch.context() as launched:
        for name, value in (
            ("RANK", "1"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "29500"),
        ):
            launched.setenv(name, value)
        assert main(["finetune", str(file), "--merge"]) == 0
    assert not (tmp_path / "run" / "merged").exists()
    assert main(["finetune", str(file), "--merge"]) == 0
    assert str(tmp_path / "run" / "merged") in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(files / "base")
    theirs = PeftModel.from_pretrained(
        base, tmp_path / "run" / "checkpoints" / "step-00000001"
    ).eval()
    assert theirs.peft_config["default"].base_model_name_or_path == str(files / "base")
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            merged(tokens).logits, theirs(input_ids=tokens).logits, rtol=0, atol=1e-5
        )
    assert (tmp_path / "run" / "merged" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"train": {"steps": 1, "micro_batch_size": 1}},
            "train.micro_batch_size=1 must be even with task=dpo",
        ),
        ({"data": {"packing": True}}, "data.packing=true is not supported with task=dpo"),
        ({"data": {"train_on": "all"}}, "data.train_on=all is not supported with task=dpo"),
        ({"preference": {"margin": 2.0}}, "preference.margin=2.0 has no effect with task=dpo"),
        (
            {"task": "orpo", "preference": {"label_smoothing": 0.1}},
            "preference.label_smoothing=0.1 has no effect with task=orpo",
        ),
        (
            {"task": "sft", "preference": {"beta": 0.1}},
            "preference.beta=0.1 has no effect with task=sft",
        ),
        ({"preference": {"beta": 0.0}}, "preference.beta=0.0 must be above 0"),
        ({"preference": {"label_smoothing": 0.5}}, "preference.label_smoothing=0.5 must be in"),
        (
            {"preference": {"reference": "adapters-off"}},
            "preference.reference=adapters-off requires adapters, but lora.rank=0",
        ),
        ({"task": "dop"}, "task=dop must be one of sft, dpo, simpo, orpo"),
    ],
)
def test_settings_are_used_or_refused(sections, words, files, tmp_path):
    with pytest.raises(ConfigError) as error:
        configuration.check(configuration.from_dict(settings(files, tmp_path, **sections)))
    assert words in str(error.value)


def test_pairs_and_chats_are_prepared_separately(files, tmp_path):
    config, task = configuration.from_dict(settings(files, tmp_path)), SFTTask()
    task.prepare(config, "train")
    (words,) = task.open(config, task.architecture(config), "train").notes
    assert f"train.jsonl: {PAIRS} preference pairs in {2 * PAIRS} sequences" in words
    assert words.endswith(" tokens")
    assert "; loss on " in words
