"""The config and data of a small valid run."""

from __future__ import annotations

import numpy as np

from megatrain.data.indexed_dataset import IndexedWriter

VOCABULARY, LENGTH = 67, 16
CONFIG = {
    "model": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "data": {"sequence_length": LENGTH},
    "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2},
}


def write_data(prefix, *, tokens=800, vocabulary=VOCABULARY):
    with IndexedWriter(prefix, vocab_size=vocabulary) as writer:
        for part in (
            np.random.default_rng(0)
            .integers(0, vocabulary, tokens)
            .reshape(-1, 20 if tokens > 20 else tokens)
        ):
            writer.add(part)
