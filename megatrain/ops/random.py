"""Counter-based random numbers, keyed by their use, so that checkpoints need no generator state.

Initial weights: element i of a tensor depends only on (seed, tensor name, i), whatever part of the
tensor a rank holds. Dropout: a mask depends on (seed, step, microbatch, layer, position in the
layer), and on the tensor rank where ranks hold shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Elements generated at once; they bound the extra memory, whatever the tensor's size."""


def random_key(*parts: object) -> int:
    """Returns a 63-bit key of the parts."""
    digest = hashlib.blake2b(
        "\x1f".join(str(part) for part in parts).encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") >> 1


def normal_slice(
    seed: int, name: str, shape: tuple[int, ...], part: tuple[slice, ...], *, std: float
) -> Tensor:
    """Returns `part` of an fp32 tensor of `shape` whose elements are normal(0, std).

    The elements follow from their global index: a counter-based generator (Philox, SC11 "Parallel
    random numbers: as easy as 1, 2, 3") and Box-Muller. Each row starts at a counter of its own, so
    that any part can be generated alone.
    """
    return _slice(random_key("init", seed, name), shape, part, _normal_rows).mul_(std)


def uniform_slice(
    seed: int, name: str, shape: tuple[int, ...], part: tuple[slice, ...], *, bound: float
) -> Tensor:
    """Returns `part` of an fp32 tensor of `shape` whose elements are uniform in (-bound, bound]."""
    return (
        _slice(random_key("init", seed, name), shape, part, _uniform_rows)
        .mul_(2 * bound)
        .sub_(bound)
    )


def _slice(
    philox_key: int,
    shape: tuple[int, ...],
    part: tuple[slice, ...],
    make_rows: Callable[[int, int, int, int], np.ndarray],
) -> Tensor:
    matrix_shape = (1, *shape) if len(shape) == 1 else shape
    rows, columns = (slice(0, 1), *part) if len(shape) == 1 else part
    width = matrix_shape[1]
    blocks = -(-width // 8)
    chunk = max(1, CHUNK_ELEMENTS // width)
    values = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
    for first in range(rows.start, rows.stop, chunk):
        last = min(first + chunk, rows.stop)
        values[first - rows.start : last - rows.start] = make_rows(philox_key, first, last, blocks)[
            :, columns
        ]
    return torch.from_numpy(values).view([s.stop - s.start for s in part])


def _uniform_rows(philox_key: int, first: int, last: int, blocks: int) -> np.ndarray:
    """Returns numbers in (0, 1] for rows [first, last), 8 for each Philox block of 4 x 64 bits."""
    return (
        _uniform_words(philox_key, first, last, blocks)
        .astype(np.float32)
        .reshape(last - first, blocks * 8)
    )


def _normal_rows(philox_key: int, first: int, last: int, blocks: int) -> np.ndarray:
    """Returns standard normal numbers for rows [first, last), from the same words."""
    uniform = _uniform_words(philox_key, first, last, blocks).reshape(-1, 2)
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0]))
    angle = (2.0 * np.pi) * uniform[:, 1]
    pair = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pair.astype(np.float32).reshape(last - first, blocks * 8)


def _uniform_words(philox_key: int, first: int, last: int, blocks: int) -> np.ndarray:
    """Returns numbers in (0, 1], positive because `_normal_rows` takes their logarithm.

    They stay in float64 so that results do not depend on the vector width.
    """
    generator = np.random.Philox(key=philox_key)
    generator.advance(first * blocks)
    words = generator.random_raw((last - first) * blocks * 4).view(np.uint32)
    return (words.astype(np.float64) + 1.0) * 2.0**-32


def dropout(x: Tensor, probability: float, mask_key: int, *, training: bool) -> Tensor:
    """Applies dropout with a mask that is a function of `mask_key`."""
    if not training or probability == 0.0:
        return x
    torch.manual_seed(mask_key)
    return F.dropout(x, probability, training=True)
