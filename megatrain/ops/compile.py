"""Kernels made by torch.compile, for `train.compile`.

Only elementwise work between matrix products is compiled: norms, gated activations, rotations,
parts of CPU attention and the cross-entropy. Each of its eager steps would read and write whole
activations; a compiled kernel does so once. Products, collectives, weight gradients and
recomputation stay as they are on every layout. Forward and backward are compiled separately, and
all layers share a kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from megatrain.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., object])


@functools.cache
def compiled(function: Function) -> Function:
    """Returns the compiled function, which is compiled on its first call.

    Compilation stays in this process: worker processes would outlive a rank that is killed.
    """
    return torch.compile(function, dynamic=False, options={"compile_threads": 1})


def check_compiler(*, on_gpu: bool) -> None:
    """Raises ConfigError if this machine lacks what torch.compile needs for its device."""
    if on_gpu:
        if importlib.util.find_spec("triton") is None:
            raise _compile_error("requires triton on GPUs", "or install it: pip install triton")
        return
    compiler = os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(compiler) is None:
        raise _compile_error(
            f"requires a C++ compiler on CPUs; {compiler} is missing",
            "or install one, or name yours in the environment variable CXX",
        )
    if not header.is_file():
        raise _compile_error(
            f"requires Python's headers on CPUs; {header} is missing",
            "or install them (python3-dev)",
        )


def _compile_error(requirement: str, hint: str) -> ConfigError:
    return ConfigError("train.compile", True, requirement, hint, fix={"train.compile": False})
