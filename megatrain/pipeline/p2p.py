"""Point-to-point transfers between stages: one process group for each directed pair of ranks.

A pair's messages of one direction arrive in the order they were sent (gloo and NCCL both keep it), so a receiver that posts
in the sender's order needs no tags, and the two directions can never wait for each other.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.distributed.mesh import MeshAxis, new_group


class PendingRecv(NamedTuple):
    """A posted receive: its tensor is filled once `work` is done. `source` is the sender's rank in the whole run."""

    tensor: Tensor
    work: dist.Work
    source: int = -1

    def wait(self) -> Tensor:
        self.work.wait()
        return self.tensor


class _Channel(NamedTuple):
    """A directed pair's group, and the peer's rank in it."""

    group: dist.ProcessGroup
    peer: int


class P2PCommunicator:
    """This rank's channels to its neighbours along the pipeline; on a ring the last rank's next is the first."""

    HELD = 8
    """On CPUs, messages on their way out before the oldest is waited for."""

    def __init__(self, axis: MeshAxis, *, ring: bool) -> None:
        self.axis = axis
        self._to: dict[int, _Channel] = {}
        self._from: dict[int, _Channel] = {}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        for first in (0, 1):
            self._connect([(a, a + 1) for a in range(first, axis.size - 1, 2)])
        if ring and axis.size > 2:
            self._connect([(0, axis.size - 1)])

    def _connect(self, pairs: list[tuple[int, int]]) -> None:
        """One round of groups: the pairs share no rank, so each rank makes two, of itself where it is in no pair (new_group)."""
        pair = next((pair for pair in pairs if self.axis.rank in pair), (self.axis.rank,))
        ranks = tuple(self.axis.ranks[rank] for rank in pair)
        up, down = (new_group(ranks, name="channel", activity=self.axis.activity) for _ in range(2))
        if len(pair) == 1:
            return
        lower, upper = pair
        if self.axis.rank == lower:
            self._to[upper], self._from[upper] = _Channel(up, 1), _Channel(down, 1)
        else:
            self._to[lower], self._from[lower] = _Channel(down, 0), _Channel(up, 0)

    def send(self, tensor: Tensor, peer: int) -> None:
        """Start sending to pipeline rank `peer`; the tensor is held until it has left.

        On CPUs the peer has posted all receives of the step (see Executor), so that waiting for an old send is never for
        something that the peer is yet to do.
        """
        tensor = tensor.detach().contiguous()
        self._let_go(wait=tensor.device.type == "cpu")
        channel = self._to[peer]
        # What dist.isend calls after checks that cost as much as the sending itself.
        self._sending.append((channel.group.send([tensor], channel.peer, 0), tensor))

    def _let_go(self, *, wait: bool) -> None:
        """Of what has left. A send over gloo is known to have left only when it was waited for."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        while wait and len(self._sending) >= self.HELD:
            self._sending.popleft()[0].wait()

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, peer: int
    ) -> PendingRecv:
        """Post a receive from pipeline rank `peer`."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        channel = self._from[peer]
        return PendingRecv(
            tensor, channel.group.recv([tensor], channel.peer, 0), self.axis.ranks[peer]
        )

    def finish(self) -> None:
        """Wait until all sends have left."""
        while self._sending:
            self._sending.popleft()[0].wait()
