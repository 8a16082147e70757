"""Ranks and billions of matrix weights that each file of configs/ is written for."""

from __future__ import annotations

WRITTEN_FOR = {
    "demo_cpu": (4, 0.0024),
    "finetune_sft_demo_cpu": (2, 0.0024),
    "finetune_lora_llama3_8b": (8, 7.50),
    "finetune_qlora_llama3_70b": (4, 69.5),
    "finetune_dpo_llama3_8b": (16, 7.50),
    "finetune_classify_demo_cpu": (2, 0.00059),
    "gpt2_125m": (8, 0.124),
    "llama3_8b": (64, 7.50),
    "llama3_70b": (64, 69.5),
    "qwen3_8b": (64, 7.57),
    "gpt3_175b": (1536, 174.6),
    "gpt_1t": (3072, 1008),
}
"""Ranks, and billions of weights in matrices: all but an input embedding and vectors."""
