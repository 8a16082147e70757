"""Files and settings of finetuning runs."""

from __future__ import annotations

import json

import numpy as np
from transformers import AutoModelForCausalLM

from helpers.chat_templates import CHATML, WITH_MARKS
from megatrain.data.tokenizer import train_tokenizer
from megatrain.models.config import load_hf_config

VOCABULARY, LENGTH, CHATS, STEPS, LR = 290, 96, 20, 4, 1e-3
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


def make_files(folder):
    """Writes chats of different lengths, a tokenizer, and templates with and without marks."""
    random = np.random.default_rng(0)
    (folder / "text.jsonl").write_text(json.dumps({"text": " ".join(WORDS * 5)}))
    train_tokenizer(
        [folder / "text.jsonl"],
        vocab_size=VOCABULARY,
        output=folder / "tokenizer",
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )

    def turn(role, most):
        return {"role": role, "content": " ".join(random.choice(WORDS, random.integers(1, most)))}

    for name in ("train", "valid"):
        chats = [
            [turn("user", 8), turn("assistant", 12)] * int(random.integers(1, 3))
            for _ in range(CHATS)
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
        )
    AutoModelForCausalLM.from_config(load_hf_config(GPT2)).save_pretrained(folder / "gpt2")
    (folder / "marks.jinja").write_text(WITH_MARKS)
    (folder / "chatml.jinja").write_text(CHATML)
    return folder


def settings(files, **sections):
    """Returns the raw config of a finetuning, with `sections` merged in."""
    raw = {
        "run": {"output_dir": str(files / "run"), "seed": 7},
        "model": MODEL,
        "data": {
            "train": str(files / "train.jsonl"),
            "valid": str(files / "valid.jsonl"),
            "tokenizer": str(files / "tokenizer"),
            "chat_template": str(files / "chatml.jinja"),
            "sequence_length": LENGTH,
            "too_long": "error",
        },
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 1},
        "optimizer": {"lr": LR, "grad_clip": 0.5},
        "lr_schedule": {"name": "constant"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return raw
