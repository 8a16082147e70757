"""Names that stand for nothing, or for a loopback, are refused in a sentence before ranks wait for each other."""

import socket

import pytest

from megatrain.distributed import host_names
from megatrain.distributed.env import RankEnv
from megatrain.distributed.host_names import check_host_names
from megatrain.errors import UserError

HERE = "gpu-a-007.cluster.example"
PLACE = RankEnv(3, 8, 1, 2, "gpu-a-001", 1234)


@pytest.fixture
def known(monkeypatch):
    """What a machine called HERE knows: addresses by name."""
    addresses = {"gpu-a-001": ["10.0.0.1"], HERE: ["10.0.0.7"]}

    def look_up(name, port, **more):
        found = addresses.get(name, socket.EAI_NONAME)
        if isinstance(found, int):
            raise socket.gaierror(found, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]

    monkeypatch.setattr(host_names.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(host_names.socket, "gethostname", lambda: HERE)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return addresses


def test_names_that_stand_for_addresses(known):
    check_host_names(PLACE, gloo=True)
    known[HERE] = ["127.0.1.1", "fe80::7%eth0", "10.0.0.7"]
    check_host_names(PLACE, gloo=True)


def test_a_meeting_point_of_no_address(known):
    del known["gpu-a-001"]
    with pytest.raises(
        UserError,
        match=r"^the ranks are to meet on gpu-a-001, and gpu-a-007\S+ knows no address of that name \(Name or .* export MASTER_ADDR",
    ):
        check_host_names(PLACE, gloo=False)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["127.0.1.1", "::1"], r"stands for 127\.0\.1\.1, ::1 on itself"),
        (socket.EAI_NONAME, "has no address"),
    ],
)
def test_an_own_name_that_others_cannot_use(own, words, known, monkeypatch):
    known[HERE] = own
    with pytest.raises(
        UserError, match=rf"this machine, gpu-a-007\S+ {words}.* export GLOO_SOCKET_IFNAME"
    ):
        check_host_names(PLACE, gloo=True)
    check_host_names(PLACE, gloo=False)  # NCCL asks interfaces and no names
    check_host_names(PLACE._replace(local_size=8), gloo=True)  # all ranks are here
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_host_names(PLACE, gloo=True)


def test_a_name_server_without_an_answer_is_asked_again(known, monkeypatch):
    pauses = []
    known["gpu-a-001"] = socket.EAI_AGAIN
    monkeypatch.setattr(
        host_names.time,
        "sleep",
        lambda seconds: (
            pauses.append(seconds)
            or (len(pauses) == 2 and known.update({"gpu-a-001": ["10.0.0.1"]}))
        ),
    )
    check_host_names(PLACE, gloo=True)
    assert len(pauses) == 2
    known["gpu-a-001"] = socket.EAI_AGAIN
    with pytest.raises(UserError, match="knows no address"):
        check_host_names(PLACE, gloo=True)
