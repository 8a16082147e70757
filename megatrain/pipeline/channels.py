"""Point-to-point transfers between stages: one process group for each directed pair of ranks.

A pair's messages of one direction arrive in the order they were sent (gloo and NCCL both keep it), so a receiver that posts
in the sender's order needs no tags, and the two directions can never wait for each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.parallel.grid import Axis, new_group


class Arrival(NamedTuple):
    """A posted receive: its tensor is filled once `work` is done."""

    tensor: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.tensor


class Channels:
    """This rank's channels to its neighbours along the pipeline; on a ring the last rank's next is the first."""

    def __init__(self, axis: Axis, *, ring: bool) -> None:
        self.axis = axis
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []
        for first in (0, 1):
            self._connect([(a, a + 1) for a in range(first, axis.size - 1, 2)])
        if ring and axis.size > 2:
            self._connect([(0, axis.size - 1)])

    def _connect(self, pairs: list[tuple[int, int]]) -> None:
        """One round of groups: the pairs share no rank, so each rank makes two, of itself where it is in no pair (new_group)."""
        pair = next((pair for pair in pairs if self.axis.rank in pair), None)
        members = (self.axis.rank,) if pair is None else pair
        for direction in (members, members[::-1]):
            self._groups[direction] = new_group(tuple(self.axis.ranks[i] for i in members))

    def send(self, tensor: Tensor, peer: int) -> None:
        """Start sending to pipeline rank `peer`; the tensor is held until it has left."""
        self._sending = [(work, held) for work, held in self._sending if not work.is_completed()]
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, self.axis.ranks[peer], group=self._groups[self.axis.rank, peer])
        self._sending.append((work, tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, peer: int) -> Arrival:
        """Post a receive from pipeline rank `peer`."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        return Arrival(tensor, dist.irecv(tensor, self.axis.ranks[peer], group=self._groups[peer, self.axis.rank]))

    def finish(self) -> None:
        """Wait until all sends have left."""
        for work, _ in self._sending:
            work.wait()
        self._sending = []
