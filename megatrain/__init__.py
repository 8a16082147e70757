"""megatrain: a pipeline-parallel trainer for large transformers on DeepSpeed.

The public Python API (docs/python-api.md) is imported on first use, so that `import megatrain`
takes milliseconds and needs no torch:

    >>> import megatrain as mt
    >>> config = mt.load_config("run.yaml", {"train.steps": 1000})
    >>> result = mt.train(config)

These names, `megatrain.errors`, and the names that `megatrain.data` and `megatrain.pipeline` list
in `__all__` are stable. Everything else may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatrain.version import __version__  # noqa: F401

if TYPE_CHECKING:
    from megatrain import data, errors, pipeline
    from megatrain.api import check, finetune, load_config, train
    from megatrain.checkpoint.checkpoint import Checkpoint
    from megatrain.config.loader import Config
    from megatrain.conversion.convert import convert
    from megatrain.evaluation.run import evaluate
    from megatrain.models.hf import register_family
    from megatrain.training.callback import Callback
    from megatrain.training.trainer import Trainer

__all__ = [
    "Callback",
    "Checkpoint",
    "Config",
    "Trainer",
    "check",
    "convert",
    "data",
    "errors",
    "evaluate",
    "finetune",
    "load_config",
    "pipeline",
    "register_family",
    "train",
]

_ORIGINS = {
    "Callback": "megatrain.training.callback:Callback",
    "Checkpoint": "megatrain.checkpoint.checkpoint:Checkpoint",
    "Config": "megatrain.config.loader:Config",
    "Trainer": "megatrain.training.trainer:Trainer",
    "check": "megatrain.api:check",
    "convert": "megatrain.conversion.convert:convert",
    "data": "megatrain.data",
    "errors": "megatrain.errors",
    "evaluate": "megatrain.evaluation.run:evaluate",
    "finetune": "megatrain.api:finetune",
    "load_config": "megatrain.api:load_config",
    "pipeline": "megatrain.pipeline",
    "register_family": "megatrain.models.hf:register_family",
    "train": "megatrain.api:train",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _ORIGINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _ORIGINS[name].partition(":")
    value = importlib.import_module(module)
    value = getattr(value, attribute) if attribute else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
