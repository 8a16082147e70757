"""Distribution of samples to steps, microbatches and data ranks.

With G = global_batch_size, m = micro_batch_size and D data ranks, step s takes positions
[s*G, (s+1)*G):

    positions of a step, G = 8, m = 2, D = 2      0 1 | 2 3 | 4 5 | 6 7
    data rank 0                                   mb 0        mb 1
    data rank 1                                         mb 0        mb 1

For every D the ranks together take the same samples in a step, so a run is independent of its
layout. A checkpoint stores the step only, counted in global batches from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from megatrain.data.gpt_dataset import Sample, Samples
from megatrain.errors import ConfigError


class Batch(NamedTuple):
    """The samples of one microbatch: the fields of `Sample`, stacked along dim 0.

    All are int64 [micro_batch_size, sequence_length] except `targets`, which is fp32
    [micro_batch_size, labels].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    targets: torch.Tensor | None = None


class DataLoader:
    """The microbatches of one data rank; a background thread fetches those of the next step.

    Raises:
        ConfigError: the global batch cannot be divided evenly.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
    ) -> None:
        divisor = micro_batch_size * data_size
        if global_batch_size < 1 or global_batch_size % divisor:
            raise ConfigError(
                "train.global_batch_size",
                global_batch_size,
                f"must be a multiple of train.micro_batch_size={micro_batch_size} "
                f"times {data_size} data ranks",
                f"use a multiple of {divisor}",
                fix={"train.global_batch_size": max(-(-global_batch_size // divisor), 1) * divisor},
            )
        assert 0 <= data_rank < data_size, (data_rank, data_size)
        self._samples = samples
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def positions(self, step: int) -> list[range]:
        """Returns the positions of each of this rank's microbatches in `step`."""
        stride = self._micro_batch_size * self._data_size
        first = step * self._global_batch_size + self._data_rank * self._micro_batch_size
        starts = range(first, (step + 1) * self._global_batch_size, stride)
        return [range(start, start + self._micro_batch_size) for start in starts]

    def microbatches(self, step: int) -> list[Batch]:
        """Returns the microbatches of `step` and starts to fetch those of `step + 1`.

        An error of the background fetch, such as a damaged file, is raised by the step that needs
        the data.
        """
        if self._next is not None and self._next[0] == step:
            batches = self._next[1].result()
        else:
            batches = self._fetch(step)
        self._next = (step + 1, self._thread.submit(self._fetch, step + 1))
        return batches

    @property
    def origin(self) -> Callable[[int], tuple[str, list[int]]] | None:
        """A function from positions to the dataset and documents of a sample; None if unknown."""
        return getattr(self._samples, "origin", None)

    def close(self) -> None:
        """Stops the background thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, step: int) -> list[Batch]:
        return [
            _stack([self._samples.fetch(position) for position in positions])
            for positions in self.positions(step)
        ]


def _stack(samples: list[Sample]) -> Batch:
    fields = (
        None if field[0] is None else torch.from_numpy(np.stack(field))
        for field in zip(*samples, strict=True)
    )
    return Batch(*fields)  # type: ignore[arg-type]
