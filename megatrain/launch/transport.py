"""Lines of JSON between two watchdogs.

That a process is gone, however it ended, its kernel tells the other end at once; that a machine is gone, its silence does after
a minute. A process that is stopped keeps its connections.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import threading
from collections.abc import Mapping
from typing import Any

_SEND_SECONDS = 5.0
_CONNECT_SECONDS = 60.0
_LONGEST_LINE = 1 << 24
Message = dict[str, Any]


class JsonConnection:
    """One end of a connection. `send` may be called by any thread, `receive` by one, once there is something."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._sending, self._rest = connection, threading.Lock(), b""

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """What cannot be sent is lost: that the other end is gone is seen where it is listened to."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """The messages that have come whole; None when the other end is gone, or speaks another language."""
        try:
            part = self._connection.recv(1 << 16)
            *lines, self._rest = (self._rest + part).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        if (
            not part
            or len(self._rest) > _LONGEST_LINE
            or not all(isinstance(message, dict) for message in messages)
        ):
            return None
        return messages

    def close(self) -> None:
        self._connection.close()


def listen(address: str, *, peers: int) -> socket.socket:
    """A listening socket on the host that others know by `address`. Its own name may mean something else to a host itself
    (127.0.1.1), so unless the address is the loopback one, all its interfaces are listened to."""
    if _is_loopback(address):
        return socket.create_server((address, 0), family=_family(address), backlog=peers)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=peers, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=peers)


def connect(address: str, port: int) -> JsonConnection:
    return JsonConnection(socket.create_connection((address, port), timeout=_CONNECT_SECONDS))


def _is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
