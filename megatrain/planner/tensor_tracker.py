"""Counts the bytes of tensors that live, op by op, also of tensors without memory (torch's meta device).

Every storage counts once, from the op that makes it until nothing holds it any more, however many views there are of it. What a
kernel takes for itself inside one op is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorTracker(TorchDispatchMode):
    """While it is entered, tensors that ops make are counted; those that are there already only if given, and then as nothing.

    Attributes:
        bytes: of what lives now.
        peak: the most that has lived at once since the start, or since `reset_peak`.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._there = [tensor.untyped_storage() for tensor in there]
        self._known = {storage._cdata for storage in self._there}

    def reset_peak(self) -> None:
        self.peak = self.bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs: set[int] | None = None
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                if inputs is None:
                    inputs = {
                        leaf.untyped_storage()._cdata
                        for leaf in tree_iter((args, kwargs))
                        if isinstance(leaf, Tensor)
                    }
                if tensor.untyped_storage()._cdata not in inputs:
                    self._add(tensor)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
