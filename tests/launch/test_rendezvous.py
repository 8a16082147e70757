"""Ranks that do not come to where all meet are named, by one that did."""

import pytest
from torch.distributed import DistNetworkError, TCPStore

from megatrain.distributed.env import RankEnv
from megatrain.errors import UserError
from megatrain.launch import rendezvous

SOON = 0.5
"""Seconds of patience for what will not come: nothing here has to happen within them."""
LONG = 240.0


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nobody needs time to hear or to speak: there is one rank at a time, and what others say is in the store."""
    for name in ("_TO_HEAR", "_TO_SPEAK"):
        monkeypatch.setattr(rendezvous, name, 0.0)


@pytest.fixture
def store():
    """As a supervisor or torchrun hold it."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(rank, store, *, come, word=None, world_size=8, patience=LONG):
    """As one rank; `come` are those that have."""
    for other in come:
        store.set(f"megatrain/come/{other}", "a machine")
    if word is not None:
        store.set("megatrain/all", word)
    return rendezvous.rendezvous(
        RankEnv(rank, world_size, rank, world_size, "127.0.0.1", store.port),
        supervised=True,
        patience=patience,
    )


def test_all_meet(store):
    for rank in range(3):
        given = meet(rank, store, come=range(3), word="" if rank else None, world_size=3)
        given.set("x", "y")
        assert store.get("x") == b"y"
    assert store.get("megatrain/all") == b""


def test_rank_0_names_those_that_never_came(store):
    with pytest.raises(
        UserError,
        match=rf"^ranks 2, 4-6 of 8 did not come to 127.0.0.1:{store.port}, where ranks meet, in 0 s \(run.hang_timeout",
    ) as error:
        meet(0, store, come=(1, 3, 7), patience=SOON)
    assert store.get("megatrain/all").decode() == str(error.value)


def test_the_others_leave_it_to_rank_0(store):
    with pytest.raises(rendezvous.ReportedByRank0, match=r"^rank 2 of 8 did not come"):
        meet(3, store, come=(0, 1), word="rank 2 of 8 did not come")


@pytest.mark.parametrize("come", [(), (0,)])
def test_a_rank_0_that_does_not_come_or_go_on(store, come):
    """It may have come and died before it could say anything."""
    with pytest.raises(
        UserError,
        match=r"^rank 3 \(.*\) waited for rank 0 at 127.0.0.1:.*, where ranks meet, and it never came",
    ):
        meet(3, store, come=come, patience=SOON)


def test_a_rank_0_that_is_not_there(store, monkeypatch):
    monkeypatch.setattr(rendezvous, "_LEAST", 0.0)
    port = store.port
    del store
    with pytest.raises(
        UserError,
        match=r"^rank 1 \(.*\) waited for rank 0 at 127.0.0.1:.* and it (never came|is gone) ",
    ):
        rendezvous.rendezvous(
            RankEnv(1, 2, 1, 2, "127.0.0.1", port), supervised=True, patience=SOON
        )


def test_a_port_that_is_taken_is_no_rank_that_never_came(store, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(DistNetworkError, match="EADDRINUSE"):
        rendezvous.rendezvous(
            RankEnv(0, 2, 0, 2, "127.0.0.1", store.port), supervised=False, patience=LONG
        )


def test_patience():
    assert rendezvous.timeout_of(600.0) == 600.0
    assert rendezvous.timeout_of(6.0) == 120.0, "ranks do not start at once"
    assert rendezvous.timeout_of(0.0) == 1800.0
