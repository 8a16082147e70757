"""Host names that do not resolve, or resolve to a loopback, are refused before the rendezvous."""

import socket

import pytest

from megatrain.distributed import env
from megatrain.distributed.env import RankEnv, check_host_names
from megatrain.errors import UserError

OWN_NAME = "gpu-a-007.cluster.example"
ENV = RankEnv(3, 8, 1, 2, "gpu-a-001", 1234)


@pytest.fixture
def known(monkeypatch):
    """Addresses by name, as the machine OWN_NAME resolves them."""
    addresses = {"gpu-a-001": ["10.0.0.1"], OWN_NAME: ["10.0.0.7"]}

    def look_up(name, port, **more):
        found = addresses.get(name, socket.EAI_NONAME)
        if isinstance(found, int):
            raise socket.gaierror(found, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]

    monkeypatch.setattr(env.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(env.socket, "gethostname", lambda: OWN_NAME)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return addresses


def test_names_that_resolve_are_accepted(known):
    check_host_names(ENV, gloo=True)
    known[OWN_NAME] = ["127.0.1.1", "fe80::7%eth0", "10.0.0.7"]
    check_host_names(ENV, gloo=True)


def test_unresolved_rendezvous_address_is_refused(known):
    del known["gpu-a-001"]
    with pytest.raises(
        UserError,
        match=r"^gpu-a-007\S+ cannot resolve the rendezvous address gpu-a-001 \(Name .* export M",
    ):
        check_host_names(ENV, gloo=False)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["127.0.1.1", "::1"], r"resolves to 127\.0\.1\.1, ::1 on the machine itself"),
        (socket.EAI_NONAME, "cannot be resolved"),
    ],
)
def test_local_host_name_must_be_reachable_from_other_machines(own, message, known, monkeypatch):
    known[OWN_NAME] = own
    with pytest.raises(
        UserError, match=rf"this machine, gpu-a-007\S+ {message}.* export GLOO_SOCKET_IFNAME"
    ):
        check_host_names(ENV, gloo=True)
    check_host_names(ENV, gloo=False)  # NCCL uses interfaces, not names
    check_host_names(ENV._replace(local_size=8), gloo=True)  # all ranks are local
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_host_names(ENV, gloo=True)


def test_lookup_is_retried_if_the_name_server_times_out(known, monkeypatch):
    pauses = []
    known["gpu-a-001"] = socket.EAI_AGAIN
    monkeypatch.setattr(
        env.time,
        "sleep",
        lambda seconds: (
            pauses.append(seconds)
            or (len(pauses) == 2 and known.update({"gpu-a-001": ["10.0.0.1"]}))
        ),
    )
    check_host_names(ENV, gloo=True)
    assert len(pauses) == 2
    known["gpu-a-001"] = socket.EAI_AGAIN
    with pytest.raises(UserError, match="cannot resolve"):
        check_host_names(ENV, gloo=True)
