"""Ranks that are missing in the rendezvous are reported, by one rank."""

import pytest
from torch.distributed import DistNetworkError, TCPStore

from megatrain.distributed.env import RankEnv
from megatrain.errors import UserError
from megatrain.launch import rendezvous

SHORT = 0.5
"""Seconds to wait for ranks that never arrive; nothing has to happen within them."""
LONG = 240.0


@pytest.fixture(autouse=True)
def no_delays(monkeypatch):
    """There is one rank at a time: none has to wait for others to read the store."""
    for name in ("_ANNOUNCE_SECONDS", "_REPORT_DELAY"):
        monkeypatch.setattr(rendezvous, name, 0.0)


@pytest.fixture
def store():
    """A store as a supervisor or torchrun hosts it."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def join(rank, store, *, arrived, announcement=None, world_size=8, timeout=LONG):
    """Runs the rendezvous of one rank; the ranks in `arrived` have joined before."""
    for other in arrived:
        store.set(f"megatrain/come/{other}", "a machine")
    if announcement is not None:
        store.set("megatrain/all", announcement)
    return rendezvous.rendezvous(
        RankEnv(rank, world_size, rank, world_size, "127.0.0.1", store.port),
        supervised=True,
        timeout=timeout,
    )


def test_all_ranks_join(store):
    for rank in range(3):
        given = join(rank, store, arrived=range(3), announcement="" if rank else None, world_size=3)
        given.set("x", "y")
        assert store.get("x") == b"y"
    assert store.get("megatrain/all") == b""


def test_rank_0_reports_missing_ranks(store):
    with pytest.raises(
        UserError,
        match=rf"^ranks 2, 4-6 of 8 did not connect to 127.0.0.1:{store.port} within 0 s \(run.h",
    ) as error:
        join(0, store, arrived=(1, 3, 7), timeout=SHORT)
    assert store.get("megatrain/all").decode() == str(error.value)


def test_other_ranks_leave_the_report_to_rank_0(store):
    with pytest.raises(rendezvous.ReportedByRank0, match=r"^rank 2 of 8 did not connect"):
        join(3, store, arrived=(0, 1), announcement="rank 2 of 8 did not connect")


@pytest.mark.parametrize("arrived", [(), (0,)])
def test_rank_0_that_never_arrives_or_dies(store, arrived):
    """Rank 0 may have joined and died before its announcement."""
    with pytest.raises(
        UserError,
        match=r"^rank 3 \(.*\) waited for rank 0 at 127.0.0.1:.*, but rank 0 did not start",
    ):
        join(3, store, arrived=arrived, timeout=SHORT)


def test_rank_0_is_missing(store, monkeypatch):
    monkeypatch.setattr(rendezvous, "_MIN_TIMEOUT", 0.0)
    port = store.port
    del store
    with pytest.raises(
        UserError,
        match=r"^rank 1 \(.*\) waited for rank 0 at 127.* but rank 0 (did not start|is gone) ",
    ):
        rendezvous.rendezvous(
            RankEnv(1, 2, 1, 2, "127.0.0.1", port), supervised=True, timeout=SHORT
        )


def test_port_in_use_is_reported_as_such(store, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(DistNetworkError, match="EADDRINUSE"):
        rendezvous.rendezvous(
            RankEnv(0, 2, 0, 2, "127.0.0.1", store.port), supervised=False, timeout=LONG
        )


def test_timeout():
    assert rendezvous.rendezvous_timeout(600.0) == 600.0
    assert rendezvous.rendezvous_timeout(6.0) == 120.0, "ranks may start at different times"
    assert rendezvous.rendezvous_timeout(0.0) == 1800.0
