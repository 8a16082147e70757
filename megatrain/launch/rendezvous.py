"""Where the ranks of a run find each other, before any of them has a watchdog: a store, to which each says that it has come.

    rank 0       waits for all, then says that they are there, or who is not
    the others   wait for rank 0, then for its word

So ranks that never come are named once, by rank 0, and a rank 0 that never comes by those that know it best.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from megatrain.distributed import device
from megatrain.distributed.env import RankEnv
from megatrain.distributed.host_names import check_host_names
from megatrain.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

# The first step of a large run, a slow file system or a long evaluation on one rank must not look like a hang.
GROUP_TIMEOUT = timedelta(minutes=30)

_LEAST = 120.0
"""Seconds between the first rank's start and the last one's that are nothing unusual, however soon a stall is to be noticed."""
_TO_HEAR = 2.0
"""How long rank 0, which may hold the store, stays for the others to hear that the run ends."""
_TO_SPEAK = 10.0
"""How much longer those wait whose words would be the same as others'."""
_COME, _WORD = "megatrain/come/{}", "megatrain/all"


class ReportedByRank0(UserError):
    """What rank 0 says to the user: whoever else hears it leaves in silence."""


def timeout_of(hang_timeout: float) -> float:
    """Seconds that ranks wait for each other here."""
    return max(hang_timeout, _LEAST) if hang_timeout else GROUP_TIMEOUT.total_seconds()


def rendezvous(place: RankEnv, *, supervised: bool, patience: float) -> Store:
    """The store, once all ranks have come to it; a supervisor holds it, otherwise the launcher or rank 0 does.

    Raises:
        UserError: some have not, within so many seconds.
        SaidByRank0: the same, and rank 0 says it.
        DistError: rank 0 cannot make the store.
    """
    from torch.distributed import DistError

    try:
        store = _connect(place, supervised, patience)
        store.set(_COME.format(place.rank), socket.gethostname())
        if place.rank == 0:
            _wait_for_all(store, place, patience)
        else:
            _wait_for_rank_0(store, place, patience)
    except DistError as error:
        if place.rank == 0:
            raise
        if place.rank != 1 and place.local_rank != 0:
            time.sleep(_TO_SPEAK)
        raise UserError(
            f"rank {place.rank} ({socket.gethostname()}) waited for rank 0 at {place.master_addr}:{place.master_port}, where ranks meet, and it "
            f"{'never came' if _is_timeout(error) else 'is gone'} ({_first_line(error)}): see why it was not started or has ended, or what "
            "keeps this machine from reaching it"
        ) from None
    return store


def _connect(place: RankEnv, supervised: bool, patience: float) -> Store:
    from torch.distributed import PrefixStore, TCPStore

    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not supervised:
        check_host_names(place, gloo=not device.has_gpu())
    # It does not wait for the others itself: in the end it would not say who they were.
    store = TCPStore(
        place.master_addr,
        place.master_port,
        place.world_size,
        is_master=place.rank == 0 and not supervised and not of_launcher,
        timeout=timedelta(seconds=max(patience, _LEAST)),
        wait_for_workers=False,
        multi_tenant=not supervised,
    )
    store.set_timeout(GROUP_TIMEOUT)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if supervised or attempt is None or place.local_size < place.world_size:
        return store
    # torchrun on one machine keeps its store through restarts, with the addresses that the attempt before has left there. (On
    # several it makes a new one each time, and their counts may differ.)
    return PrefixStore(f"attempt-{attempt}", store)


def _wait_for_all(store: Store, place: RankEnv, patience: float) -> None:
    from torch.distributed import DistStoreError

    try:
        store.wait(
            [_COME.format(rank) for rank in range(place.world_size)], timedelta(seconds=patience)
        )
    except DistStoreError:
        missing = [
            rank for rank in range(place.world_size) if not store.check([_COME.format(rank)])
        ]
        text = (
            f"{_listed(missing)} of {place.world_size} did not come to {place.master_addr}:{place.master_port}, where ranks meet, in {patience:.0f} s "
            "(run.hang_timeout, but two minutes at least): see why they were not started, or what keeps their machines from reaching this one"
        )
        store.set(_WORD, text)
        time.sleep(_TO_HEAR)
        raise UserError(text) from None
    store.set(_WORD, "")


def _wait_for_rank_0(store: Store, place: RankEnv, patience: float) -> None:
    store.wait([_COME.format(0)], timedelta(seconds=patience))
    store.wait(
        [_WORD], timedelta(seconds=patience + _TO_SPEAK)
    )  # it may have come later than this rank
    if text := store.get(_WORD).decode():
        time.sleep(2 * _TO_HEAR)  # who leaves first is what a launcher calls the cause
        raise ReportedByRank0(text)


def _listed(ranks: Sequence[int]) -> str:
    """`ranks 2, 8-15`."""
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    shown = ", ".join(
        f"{first}" if first == last else f"{first}-{last}"
        for first, last in zip(starts, ends, strict=True)
    )
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _is_timeout(error: Exception) -> bool:
    return "time" in _first_line(error).lower()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
