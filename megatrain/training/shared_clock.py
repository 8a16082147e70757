"""A clock that all ranks share: that of rank 0.

Ranks of one machine share `time.perf_counter`, which counts from the start of the machine. The
first rank of each other machine asks rank 0 for the time. The error of the answer is at most half
of the duration of the exchange, so the fastest of several exchanges is used.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.mesh import MeshAxis

EXCHANGES = 16
"""Exchanges with rank 0 for one offset."""


class Offset(NamedTuple):
    """The seconds to add to this rank's clock to get that of rank 0, and their largest error."""

    seconds: float
    error: float


class SharedClock:
    """Compares `time.perf_counter` of this rank with that of rank 0. All ranks use it together.

    Attributes:
        first_ranks: the first rank of each machine, rank 0 first.
    """

    def __init__(self, world: MeshAxis, machine: str | None = None) -> None:
        self.rank, self.world = world.rank, world
        self.machines = gather_objects(machine or machine_id(), world)
        self.first_ranks = sorted({self.machines.index(name) for name in self.machines})
        # Messages between CPUs need gloo, whatever the backend of the run.
        with world.activity.collective("making a group of the", world):
            self.group = (
                dist.new_group(self.first_ranks, backend="gloo")
                if len(self.first_ranks) > 1
                else None
            )

    def offset(self) -> Offset:
        """Returns the offset of this rank, the same on all ranks of a machine."""
        local = Offset(0.0, 0.0)
        if self.group is None:
            return local
        if self.rank in self.first_ranks:
            local = self._answer() if self.rank == 0 else self._ask()
            self.world.activity.set("comparing clocks")
        return gather_objects(local, self.world)[self.machines.index(self.machines[self.rank])]

    def _answer(self) -> Offset:
        """Sends the time to each asking rank in turn."""
        for peer in self.first_ranks[1:]:
            self.world.activity.set_waiting_for("a request for the time", peer)
            for _ in range(EXCHANGES):
                dist.recv(torch.empty(1, dtype=torch.float64), peer, group=self.group)
                dist.send(
                    torch.tensor([time.perf_counter()], dtype=torch.float64), peer, group=self.group
                )
        return Offset(0.0, 0.0)

    def _ask(self) -> Offset:
        best = Offset(0.0, float("inf"))
        self.world.activity.set_waiting_for("the time", 0)
        for _ in range(EXCHANGES):
            answer = torch.zeros(1, dtype=torch.float64)
            sent = time.perf_counter()
            dist.send(answer, 0, group=self.group)
            dist.recv(answer, 0, group=self.group)
            received = time.perf_counter()
            if (received - sent) / 2 < best.error:
                best = Offset(float(answer) - (sent + received) / 2, (received - sent) / 2)
        return best


def machine_id() -> str:
    """Returns the kernel's boot id, which is equal for processes that share a clock."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else socket.gethostname()
