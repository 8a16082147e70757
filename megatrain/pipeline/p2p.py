"""Point-to-point transfers between stages: one process group for each directed pair of ranks.

Messages of a pair arrive in the order in which they were sent, over gloo and over NCCL. A receiver
that posts its receives in the sender's order needs no tags, and the two directions cannot block
each other.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.distributed.mesh import MeshAxis, new_group


class PendingReceive(NamedTuple):
    """A posted receive, whose tensor is filled once `work` is done; `source` is the global rank."""

    tensor: Tensor
    work: dist.Work
    source: int = -1

    def wait(self) -> Tensor:
        """Returns the tensor once it has arrived."""
        self.work.wait()
        return self.tensor


class _Channel(NamedTuple):
    """Process group of a directed pair, and the peer's rank in it."""

    group: dist.ProcessGroup
    peer: int


class P2PCommunicator:
    """Channels of this rank to its neighbours along the pipeline.

    Args:
        axis: the pipeline axis.
        ring: True connects the last rank with the first, as loop placements of several chunks need.
    """

    MAX_PENDING_SENDS = 8
    """On CPUs, sends in progress before the oldest is waited for."""

    def __init__(self, axis: MeshAxis, *, ring: bool) -> None:
        self.axis = axis
        self._to: dict[int, _Channel] = {}
        self._from: dict[int, _Channel] = {}
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()
        for first in (0, 1):
            self._connect([(a, a + 1) for a in range(first, axis.size - 1, 2)])
        if ring and axis.size > 2:
            self._connect([(0, axis.size - 1)])

    def _connect(self, pairs: list[tuple[int, int]]) -> None:
        """Creates the groups of disjoint pairs; a rank in no pair creates groups of itself.

        Each rank thus takes part in two collective calls of `new_group`.
        """
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
        """Starts sending to pipeline rank `peer`; the tensor is held until it has been sent.

        On CPUs the peer has posted all receives of the step (`executor.receives_first`), so waiting
        for an old send does not depend on the peer's progress.
        """
        tensor = tensor.detach().contiguous()
        self._release_sent(wait=tensor.device.type == "cpu")
        channel = self._to[peer]
        # The call inside dist.isend, without its checks, which cost as much as the send itself.
        self._sends.append((channel.group.send([tensor], channel.peer, 0), tensor))

    def _release_sent(self, *, wait: bool) -> None:
        """Releases tensors that were sent; gloo reports completion only to those who wait."""
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        while wait and len(self._sends) >= self.MAX_PENDING_SENDS:
            self._sends.popleft()[0].wait()

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, peer: int
    ) -> PendingReceive:
        """Posts a receive from pipeline rank `peer`."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        channel = self._from[peer]
        work = channel.group.recv([tensor], channel.peer, 0)
        return PendingReceive(tensor, work, self.axis.ranks[peer])

    def finish(self) -> None:
        """Waits until all sends are done."""
        while self._sends:
            self._sends.popleft()[0].wait()
