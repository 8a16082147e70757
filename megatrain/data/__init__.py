"""Datasets on disk, tokenizers, and the samples and batches of a run.

`IndexedDataset` is public and imported on first use; everything else may change.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatrain.data.indexed_dataset import IndexedDataset

__all__ = ["IndexedDataset"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatrain.data import indexed_dataset

    return getattr(indexed_dataset, name)
