"""Validation of an evaluation before its ranks start: model, layout, windows and data."""

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
from megatrain.planner.run_spec import check_dtype

MAX_WINDOW, STRIDE = 2048, 512
"""Defaults: the window is the model's positions up to 2048, the usual choice of papers on language
models. The stride is that of the guide to perplexity of transformers."""


def check_model(config: Config) -> TransformerConfig:
    """Returns the model config.

    Raises an error if the model is not supported, the layout does not fit it, or tensors are
    missing.
    """
    model = any_architecture(load_hf_config(config.model))
    check_tensor_split(model, config.parallel.tensor)
    rank_specs(config, model, Placement(config.parallel.pipeline))
    check_dtype(config.train.dtype, on_gpu=device.has_gpu())
    Pretrained(str(config.model), model, setting="MODEL").check(
        parameter_shapes(model), new_head=False
    )
    return model


def make_windows(
    model: TransformerConfig, *, window: int | None, stride: int | None, trained: int | None = None
) -> tuple[int, int]:
    """Returns window and stride, or their defaults; raises ConfigError if they do not fit.

    Args:
        trained: sequence length in training. A classifier has the metrics of its run only if it
            sees as much of a text as in training.
    """
    longest = model.max_positions
    if window is None:
        is_classifier = trained is not None and model.classifier is not None
        window = trained if is_classifier else min(longest, MAX_WINDOW)
    assert window is not None
    if not 1 <= window <= longest:
        requirement = f"must be between 1 and the model's {longest} positions"
        raise ConfigError("--window", window, requirement, f"use --window {longest}")
    if stride is None:
        stride = min(window, STRIDE)
    if not 1 <= stride <= window:
        requirement = f"must be between 1 and --window={window}, which scores every token"
        raise ConfigError("--stride", stride, requirement, f"use --stride {min(window, STRIDE)}")
    return window, stride


def choose_kind(kind: Kind | None, data: Sequence[str], model: TransformerConfig) -> Kind:
    """Returns the requested kind, or the one that follows from the model and the data.

    Raises ConfigError if the model does not support it.
    """
    is_classifier = model.classifier is not None
    supported: list[Kind] = ["classification"] if is_classifier else ["perplexity", "choices"]
    if kind is not None and kind not in supported:
        name = "a classifier" if is_classifier else "a language model"
        requirement = f"is not supported by {name} (supported: {', '.join(supported)})"
        raise ConfigError("--kind", kind, requirement, "omit it")
    if kind is not None or is_classifier:
        return kind or "classification"
    return "choices" if not is_indexed(data[0]) and has_questions(data[0]) else "perplexity"
