"""The rendezvous of a run's ranks in a store, before any of them has a watchdog.

    rank 0       waits for all ranks, then announces that all are there, or which are missing
    other ranks  wait for rank 0, then for its announcement

Rank 0 names missing ranks once. If rank 0 itself is missing, the ranks that report it are rank 1
and the first rank of each machine.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from megatrain.distributed import device
from megatrain.distributed.env import RankEnv, check_host_names
from megatrain.distributed.process_group import GROUP_TIMEOUT
from megatrain.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_MIN_TIMEOUT = 120.0
"""Seconds that the start of a run's ranks may spread over, however short run.hang_timeout is."""
_ANNOUNCE_SECONDS = 2.0
"""Time that rank 0, which may host the store, leaves the other ranks to read its announcement."""
_REPORT_DELAY = 10.0
"""Time that a rank waits longer if other ranks report the same error."""
_ARRIVED, _ANNOUNCEMENT = "megatrain/come/{}", "megatrain/all"


class ReportedByRank0(UserError):
    """An error that rank 0 reports to the user; the other ranks exit silently."""


def rendezvous_timeout(hang_timeout: float) -> float:
    """Returns the seconds that ranks wait for each other in the rendezvous."""
    return max(hang_timeout, _MIN_TIMEOUT) if hang_timeout else GROUP_TIMEOUT.total_seconds()


def rendezvous(env: RankEnv, *, supervised: bool, timeout: float) -> Store:
    """Returns the store, once all ranks have joined.

    The supervisor hosts the store, else the launcher or rank 0 does.

    Args:
        supervised: True if a supervisor of this machine started the rank.
        timeout: seconds to wait for the other ranks.

    Raises:
        UserError: ranks are missing after the timeout.
        ReportedByRank0: the same, and rank 0 reports it.
        DistError: rank 0 cannot create the store.
    """
    from torch.distributed import DistError

    try:
        store = _connect(env, supervised, timeout)
        store.set(_ARRIVED.format(env.rank), socket.gethostname())
        if env.rank == 0:
            _wait_for_all(store, env, timeout)
        else:
            _wait_for_rank_0(store, timeout)
    except DistError as error:
        if env.rank == 0:
            raise
        if env.rank != 1 and env.local_rank != 0:
            time.sleep(_REPORT_DELAY)
        reason = "did not start" if _is_timeout(error) else "is gone"
        raise UserError(
            f"rank {env.rank} ({socket.gethostname()}) waited for rank 0 at "
            f"{env.master_addr}:{env.master_port}, but rank 0 {reason} ({_first_line(error)}); "
            "check the log of rank 0, and that this machine can reach its address"
        ) from None
    return store


def _connect(env: RankEnv, supervised: bool, timeout: float) -> Store:
    from torch.distributed import PrefixStore, TCPStore

    launcher_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not supervised:
        check_host_names(env, gloo=not device.has_gpu())
    # TCPStore itself does not wait for the workers: it could not name the missing ones.
    store = TCPStore(
        env.master_addr,
        env.master_port,
        env.world_size,
        is_master=env.rank == 0 and not supervised and not launcher_hosts_store,
        timeout=timedelta(seconds=max(timeout, _MIN_TIMEOUT)),
        wait_for_workers=False,
        multi_tenant=not supervised,
    )
    store.set_timeout(GROUP_TIMEOUT)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if supervised or attempt is None or env.local_size < env.world_size:
        return store
    # torchrun on one machine keeps its store over restarts, with the keys of the last attempt. On
    # several machines it creates a new store each time, and their counts may differ.
    return PrefixStore(f"attempt-{attempt}", store)


def _wait_for_all(store: Store, env: RankEnv, timeout: float) -> None:
    from torch.distributed import DistStoreError

    keys = [_ARRIVED.format(rank) for rank in range(env.world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except DistStoreError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        text = (
            f"{_format_ranks(missing)} of {env.world_size} did not connect to "
            f"{env.master_addr}:{env.master_port} within {timeout:.0f} s (run.hang_timeout, at "
            "least 120 s); check their logs, and that their machines can reach this address"
        )
        store.set(_ANNOUNCEMENT, text)
        time.sleep(_ANNOUNCE_SECONDS)
        raise UserError(text) from None
    store.set(_ANNOUNCEMENT, "")


def _wait_for_rank_0(store: Store, timeout: float) -> None:
    store.wait([_ARRIVED.format(0)], timedelta(seconds=timeout))
    # Rank 0 may have started later than this rank.
    store.wait([_ANNOUNCEMENT], timedelta(seconds=timeout + _REPORT_DELAY))
    if text := store.get(_ANNOUNCEMENT).decode():
        time.sleep(2 * _ANNOUNCE_SECONDS)  # a launcher reports the first process that exits
        raise ReportedByRank0(text)


def _format_ranks(ranks: Sequence[int]) -> str:
    """Returns the ranks as text, such as `ranks 2, 8-15`."""
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
