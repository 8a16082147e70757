"""Functions made one kernel by torch.compile, for `train.compile`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])


@functools.cache
def compiled(function: Function) -> Function:
    """Compiled at its first call, in this process: worker processes would outlive a rank that is killed."""
    return torch.compile(function, dynamic=False, options={"compile_threads": 1})
