"""A model's folder as a scorer: this rank's stage, filled by slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.init_from_hf import Pretrained
from megatrain.config.loader import Config
from megatrain.data.tokenizer import load_tokenizer
from megatrain.distributed.mesh import ProcessMesh
from megatrain.errors import ConfigError
from megatrain.evaluation.loglikelihood import Scorer
from megatrain.models.config import TransformerConfig
from megatrain.ops.dtypes import DTYPES
from megatrain.pipeline.stage_builder import build_stage


def open_scorer(
    folder: Path,
    config: Config,
    architecture: TransformerConfig,
    mesh: ProcessMesh,
    device: torch.device,
) -> Scorer:
    """Build this rank's stage in the settings' dtype and fill it from the folder, which was checked to hold all of it."""
    stage = build_stage(config, architecture, mesh, str(device), dtype=DTYPES[config.train.dtype])
    Pretrained(folder, architecture).load_weights(stage, seed=0)
    return Scorer(stage, config, architecture, mesh, device)


def open_tokenizer(config: Config, architecture: TransformerConfig) -> Any:
    """The settings' tokenizer, None where they name none; refuses one that the model has no embeddings for."""
    if config.data.tokenizer is None:
        return None
    tokenizer = load_tokenizer(config.data.tokenizer)
    if len(tokenizer) > architecture.vocab_size:
        raise ConfigError(
            "data.tokenizer",
            config.data.tokenizer,
            f"has {len(tokenizer)} tokens and the model {architecture.vocab_size}",
            "give the model's own",
        )
    return tokenizer


def prefix_token(tokenizer: Any, architecture: TransformerConfig) -> int | None:
    """What stands before a text: the tokenizer's beginning of a text, or else its end; the model's where there is no tokenizer."""
    for source in (tokenizer, architecture.config):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(source, name, None)
            if isinstance(token, int) and 0 <= token < architecture.vocab_size:
                return token
    return None
