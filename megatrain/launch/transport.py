"""JSON lines over TCP between the watchdogs of two ranks.

When a process ends, its kernel closes the connection at once. When a machine is lost, TCP
keep-alive ends the connection after about a minute. A stopped process keeps its connections.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import threading
from collections.abc import Mapping
from typing import Any

_SEND_TIMEOUT = 5.0
_CONNECT_TIMEOUT = 60.0
_MAX_LINE = 1 << 24

Message = dict[str, Any]


class JsonConnection:
    """One end of a connection.

    Any thread may call `send`. One thread calls `receive`, when the socket is readable.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SEND_TIMEOUT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._send_lock = threading.Lock()
        self._incomplete_line = b""

    def fileno(self) -> int:
        """Returns the socket's file descriptor, for selectors."""
        return self._connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message. Ignores errors: the receiving side detects a closed connection."""
        with self._send_lock, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Returns the complete messages; None if the peer is gone or sent something else."""
        try:
            data = self._connection.recv(1 << 16)
            *lines, self._incomplete_line = (self._incomplete_line + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        if not data or len(self._incomplete_line) > _MAX_LINE:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """Closes the socket."""
        self._connection.close()


def listen(address: str, *, peers: int) -> socket.socket:
    """Returns a listening socket on the host that other ranks reach by `address`.

    A host may resolve its own name to another address (127.0.1.1). The socket therefore listens
    on all interfaces, unless `address` is the loopback address.
    """
    if _is_loopback(address):
        return socket.create_server((address, 0), family=_family(address), backlog=peers)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=peers, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=peers)


def connect(address: str, port: int) -> JsonConnection:
    """Returns a connection to a listening watchdog. Raises OSError if it cannot be reached."""
    return JsonConnection(socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT))


def _is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
