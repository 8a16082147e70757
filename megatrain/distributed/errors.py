"""Recognises exceptions that mean the loss of a connection to another rank."""

from __future__ import annotations

_LOST_CONNECTION = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "remote process exited",
    "failed to recv, got 0 bytes",
)
"""Messages of gloo, NCCL and the store when the process at the other end is gone."""


def is_lost_connection(error: Exception) -> bool:
    """Returns True if `error` is the consequence of another rank's failure."""
    import torch.distributed as dist

    message = str(error).lower()
    return isinstance(error, dist.DistError) or any(text in message for text in _LOST_CONNECTION)
