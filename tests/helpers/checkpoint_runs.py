"""Runs of a tiny model whose checkpoints consist of several shards."""

from __future__ import annotations

from unittest.mock import patch

from helpers.training_runs import merge_sections, pretrain

VOCABULARY = 67
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def settings(folder, **sections):
    raw = {
        "run": {"output_dir": str(folder / "run")},
        "model": MODEL,
        "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2},
        "checkpoint": {"save_every": 1},
        "eval": {"every": 3, "batches": 2},
        "data": {
            "train": str(folder / "tokens"),
            "valid": str(folder / "tokens"),
            "sequence_length": 16,
        },
    }
    return merge_sections(raw, sections)


def pretrain_in_shards(rank, world_size, raw, shard_bytes):
    from megatrain.checkpoint import writer

    with patch.object(writer, "MAX_SHARD_BYTES", shard_bytes):
        pretrain(rank, world_size, raw)
