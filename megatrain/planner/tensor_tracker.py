"""Counts the bytes of live tensors after each op, on any device, including torch's meta device.

Every storage counts once, however many views it has, until its last reference is gone. Memory that
a kernel takes inside one op is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorTracker(TorchDispatchMode):
    """Context that counts the tensors that ops create in it.

    Attributes:
        bytes: bytes of live tensors.
        peak: maximum of `bytes` since the start or the last `reset_peak`.
    """

    def __init__(self, uncounted: Iterable[Tensor] = ()) -> None:
        """Takes existing tensors, whose storages never count."""
        super().__init__()
        self.bytes = self.peak = 0
        self._uncounted = [tensor.untyped_storage() for tensor in uncounted]
        self._known = {storage._cdata for storage in self._uncounted}

    def reset_peak(self) -> None:
        self.peak = self.bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs: set[int] | None = None
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                if inputs is None:
                    inputs = {
                        leaf.untyped_storage()._cdata
                        for leaf in tree_iter((args, kwargs))
                        if isinstance(leaf, Tensor)
                    }
                if tensor.untyped_storage()._cdata not in inputs:
                    self._add(tensor)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
