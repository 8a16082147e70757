"""Whether model, layout, windows and data fit each other, before any rank starts."""

from __future__ import annotations

from collections.abc import Sequence

from megatrain.checkpoint.init_from_hf import Pretrained
from megatrain.config.loader import Config
from megatrain.distributed import device
from megatrain.errors import ConfigError
from megatrain.evaluation.multiple_choice import has_questions
from megatrain.evaluation.perplexity import is_indexed
from megatrain.evaluation.spec import Kind
from megatrain.models.classification_config import any_architecture
from megatrain.models.config import TransformerConfig, load_hf_config
from megatrain.models.counts import parameter_shapes
from megatrain.models.params import check_tensor_split
from megatrain.pipeline.schedule import Placement
from megatrain.pipeline.stage_builder import rank_specs

WINDOW, STRIDE = 2048, 512
"""Where not told: the model's positions up to 2048, as papers on language models mostly report, and the stride of
transformers' guide to perplexity."""


def check_model(config: Config) -> TransformerConfig:
    """Refuse a model that is not built or whose tensors are not all there, or a layout that does not fit it."""
    architecture = any_architecture(load_hf_config(config.model))
    check_tensor_split(architecture, config.parallel.tensor)
    rank_specs(config, architecture, Placement(config.parallel.pipeline))
    if config.train.dtype == "fp16" and not device.has_gpu():
        raise ConfigError("train.dtype", "fp16", "needs a GPU", "use bf16 or fp32 on CPUs")
    Pretrained(str(config.model), architecture, setting="MODEL").check(
        parameter_shapes(architecture), new_head=False
    )
    return architecture


def make_windows(
    architecture: TransformerConfig,
    *,
    window: int | None,
    stride: int | None,
    trained: int | None = None,
) -> tuple[int, int]:
    """Window and stride as told, or by default; refuses what does not fit the model or each other.

    A classifier of ours sees as much of a text as it did in training, `trained`, so that it has the figures that the run had.
    """
    most = architecture.max_positions
    if window is None:
        window = (
            trained
            if trained is not None and architecture.classifier is not None
            else min(most, WINDOW)
        )
    if not 1 <= window <= most:
        raise ConfigError("--window", window, f"must be from 1 to the model's {most} positions")
    stride = min(window, STRIDE) if stride is None else stride
    if not 1 <= stride <= window:
        raise ConfigError(
            "--stride",
            stride,
            f"must be from 1 to --window={window}: tokens in between would not be scored",
        )
    return window, stride


def choose_kind(asked: Kind | None, data: Sequence[str], architecture: TransformerConfig) -> Kind:
    """What the model and the data are made for: a classifier tells labels; of others, questions with choices, or else text."""
    if (architecture.classifier is not None) != (asked == "classification") and asked is not None:
        what = "a language model" if architecture.classifier is None else "a classifier"
        raise ConfigError("--kind", asked, f"is not what {what} can be asked for", "leave it out")
    if architecture.classifier is not None:
        return "classification"
    if asked is not None:
        return asked
    return "choices" if not is_indexed(data[0]) and has_questions(data[0]) else "perplexity"
