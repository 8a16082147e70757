"""Numbers and lists as text."""

from __future__ import annotations

from collections.abc import Iterable

GIB = 2**30
"""Bytes of a GiB."""


def format_bytes(count: float) -> str:
    """Returns bytes in decimal units, as disks are sold: a GB is 1e9 bytes."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next((pair for pair in units if count >= 0.9995 * pair[1]), units[-1])
    return f"{count / size:,.3g} {unit}" if count < 1e15 else f"{count / 1e12:,.0f} TB"


def join_names(names: Iterable[str], *, limit: int) -> str:
    """Returns the first `limit` names with commas, and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
