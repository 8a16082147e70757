"""The watchdog of one rank, started once the ranks have a store through which to find rank 0's."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

from megatrain.distributed.activity import RankActivity
from megatrain.errors import UserError
from megatrain.launch.failure_reporter import (
    FailureReporter,
    ProcessId,
    clear_claims,
    current_process,
)
from megatrain.launch.transport import connect, listen
from megatrain.launch.watchdog_coordinator import WatchdogCoordinator
from megatrain.launch.watchdog_peer import WatchdogPeer
from megatrain.launch.watchdog_thread import WatchdogThread

if TYPE_CHECKING:
    from torch.distributed import Store

_KEY = "megatrain/watchdog"


def start_watchdog(
    activity: RankActivity, voice: FailureReporter, store: Store, *, hang_timeout: float
) -> WatchdogThread:
    """All ranks call it. The token keeps out whoever has not met at the store."""
    watchdog = (
        _hub(activity, voice, store, hang_timeout)
        if voice.place.rank == 0
        else _link(activity, voice, store, hang_timeout)
    )
    watchdog.start()
    return watchdog


def _hub(
    activity: RankActivity, voice: FailureReporter, store: Store, hang_timeout: float
) -> WatchdogThread:
    clear_claims(voice.folder)
    listener, token = (
        listen(voice.place.master_addr, peers=voice.place.world_size),
        secrets.token_hex(16),
    )
    store.set(
        _KEY,
        json.dumps({"port": listener.getsockname()[1], "token": token, "who": current_process()}),
    )
    return WatchdogCoordinator(activity, voice, listener, token=token, hang_timeout=hang_timeout)


def _link(
    activity: RankActivity, voice: FailureReporter, store: Store, hang_timeout: float
) -> WatchdogThread:
    at = json.loads(store.get(_KEY))
    address = voice.place.master_addr
    try:
        wire = connect(address, at["port"])
    except OSError as error:
        raise UserError(
            f"rank {voice.place.rank} ({current_process()}) cannot reach rank 0's watchdog at {address}:{at['port']} ({error}): ranks of a run must "
            "reach each other's machines on any port, as gloo and NCCL ask it too"
        ) from None
    return WatchdogPeer(
        activity,
        voice,
        wire,
        token=at["token"],
        hub=ProcessId(*at["who"]),
        hang_timeout=hang_timeout,
    )
