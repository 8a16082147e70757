"""Whether ranks of several machines can find each other by name, asked before they wait half an hour for one that nobody knows."""

from __future__ import annotations

import ipaddress
import os
import socket
import time

from megatrain.distributed.env import RankEnv
from megatrain.errors import UserError

_PAUSES = (1.0, 2.0, 4.0)
"""Seconds before a name server that gave no answer is asked again: at the start of a large job it is asked by all."""


def check_host_names(place: RankEnv, *, gloo: bool) -> None:
    """Raise UserError where the meeting point has no address here, or other machines would be told to reach this one at a loopback."""
    here = socket.gethostname()
    try:
        _addresses(place.master_addr)
    except socket.gaierror as error:
        raise UserError(
            f"the ranks are to meet on {place.master_addr}, and {here} knows no address of that name ({error.strerror}); export "
            "MASTER_ADDR with a name or number that every machine reaches, for jobs of Slurm in slurm/site.env"
        ) from None
    if gloo and place.local_size < place.world_size and "GLOO_SOCKET_IFNAME" not in os.environ:
        _check_own_name(here)


def _check_own_name(here: str) -> None:
    """gloo tells other machines the address that this one's own name stands for, and a loopback where it stands for none."""
    try:
        found = _addresses(here)
        if not all(ipaddress.ip_address(address).is_loopback for address in found):
            return
        why = f"stands for {', '.join(sorted(found))} on itself"
    except socket.gaierror as error:
        why = f"has no address ({error.strerror})"
    raise UserError(
        f"the name of this machine, {here}, {why}, and so ranks of other machines cannot reach its own over gloo; export "
        "GLOO_SOCKET_IFNAME with its network interface (`ip -brief addr` lists them), for jobs of Slurm in slurm/site.env"
    )


def _addresses(name: str) -> set[str]:
    """What a name stands for on this machine; socket.gaierror where it stands for nothing."""
    for pause in (*_PAUSES, None):
        try:
            return {
                str(found[4][0]).partition("%")[0]
                for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            }
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or pause is None:
                raise
            time.sleep(pause)
    raise AssertionError
