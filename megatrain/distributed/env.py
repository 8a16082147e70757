"""The rank of this process, from the environment variables that a launcher sets.

torchrun, deepspeed and accelerate set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
srun sets SLURM_* and no rendezvous address: the first host of the step and a port derived from the
job id are used.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megatrain.errors import UserError


class RankEnv(NamedTuple):
    """The rank of a process, and the address of the rendezvous."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int


def from_environment(environ: Mapping[str, str]) -> RankEnv | None:
    """Returns the rank that a launcher set; None without a launcher.

    Raises UserError if only some of the variables are set.
    """
    if "RANK" in environ:
        return _from_torchrun(environ)
    if _inside_srun(environ):
        return _from_srun(environ)
    if "LOCAL_RANK" in environ:
        raise UserError(
            "RANK is missing from the environment although LOCAL_RANK is set; a launcher sets "
            "both; unset LOCAL_RANK to start without a launcher"
        )
    return None


def is_local_rank_zero(environ: Mapping[str, str]) -> bool:
    """Returns True for one rank of each machine, which prints what all would print."""
    return environ.get("LOCAL_RANK" if "RANK" in environ else "SLURM_LOCALID", "0") == "0"


def attempt(environ: Mapping[str, str]) -> int:
    """Returns the number of this start: 1, plus requeues of Slurm and restarts of torchrun."""
    counts = (
        environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    )
    return 1 + sum(int(count) for count in counts if count.isdigit())


def _from_torchrun(environ: Mapping[str, str]) -> RankEnv:
    launcher = "the launcher's RANK is"
    world_size = _number(environ, "WORLD_SIZE", launcher)
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # the second is deepspeed's
    local_name = next((name for name in names if name in environ), "WORLD_SIZE")
    return _validated(
        RankEnv(
            rank=_number(environ, "RANK", launcher),
            world_size=world_size,
            local_rank=_number(environ, "LOCAL_RANK", launcher),
            local_size=_number(environ, local_name, launcher),
            master_addr=_text(environ, "MASTER_ADDR", launcher),
            master_port=_number(environ, "MASTER_PORT", launcher),
        )
    )


_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers its own steps (batch script, interactive, extern) down from 0xFFFFFFFE."""


def _inside_srun(environ: Mapping[str, str]) -> bool:
    """Returns True for a task of srun; False in a batch script, in salloc and in `srun --pty`."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_PTY_PORT" not in environ


def _from_srun(environ: Mapping[str, str]) -> RankEnv:
    launcher = "srun's SLURM_STEP_ID is"
    world_size = _number(environ, "SLURM_NTASKS", launcher)
    node_list = environ.get("SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST", launcher)
    return _validated(
        RankEnv(
            rank=_number(environ, "SLURM_PROCID", launcher),
            world_size=world_size,
            local_rank=_number(environ, "SLURM_LOCALID", launcher),
            local_size=_tasks_on_node(environ, world_size),
            master_addr=environ.get("MASTER_ADDR") or next(expand_hosts(node_list)),
            master_port=int(environ.get("MASTER_PORT") or _port_of_step(environ)),
        )
    )


def _port_of_step(environ: Mapping[str, str]) -> int:
    """Returns a port below the ephemeral ones, different for concurrent steps of a job."""
    job = environ.get("SLURM_JOB_ID", "0")
    if not job.isdigit():
        return 20000
    return 20000 + (int(job) * 16 + int(environ["SLURM_STEP_ID"])) % 12000


def _tasks_on_node(environ: Mapping[str, str], world_size: int) -> int:
    """Returns the tasks on this node, from SLURM_STEP_TASKS_PER_NODE such as "4(x2),1".

    Returns the world size if the variable is missing.
    """
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else world_size


def expand_hosts(node_list: str) -> Iterator[str]:
    """Yields the host names of a Slurm node list: "a[1-3,7],b" gives a1 a2 a3 a7 b."""
    # Commas inside brackets separate numbers; outside they separate names.
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        yield from _expand_name(name)


def _expand_name(name: str) -> Iterator[str]:
    before, bracket, rest = name.partition("[")
    if not bracket:
        yield name
        return
    inside, _, after = rest.partition("]")
    for part in inside.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            # "08-10" gives 08 09 10: the width of the first number is kept.
            for tail in _expand_name(after):
                yield f"{before}{number:0{len(first)}d}{tail}"


def _text(environ: Mapping[str, str], name: str, launcher: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise UserError(
            f"{name} is missing from the environment although {launcher} set; start all ranks "
            "with one launcher"
        )
    return value


def _number(environ: Mapping[str, str], name: str, launcher: str) -> int:
    value = _text(environ, name, launcher)
    if not value.isdigit():
        raise UserError(f"{name}={value} in the environment must be a whole number")
    return int(value)


def _validated(env: RankEnv) -> RankEnv:
    if not env.rank < env.world_size:
        raise UserError(
            f"rank {env.rank} in the environment must be below the world size, {env.world_size}"
        )
    if not env.local_rank < max(env.local_size, 1):
        raise UserError(
            f"local rank {env.local_rank} in the environment must be below the number of ranks "
            f"on its machine, {env.local_size}"
        )
    return env


_RETRY_SECONDS = (1.0, 2.0, 4.0)
"""Pauses before a name server is asked again: all ranks of a large job ask it at the start."""


def check_host_names(env: RankEnv, *, gloo: bool) -> None:
    """Checks that the ranks of several machines can resolve each other's names.

    Raises:
        UserError: the rendezvous address cannot be resolved, or gloo would announce a loopback
            address of this machine to the others.
    """
    host = socket.gethostname()
    try:
        _resolve(env.master_addr)
    except socket.gaierror as error:
        raise UserError(
            f"{host} cannot resolve the rendezvous address {env.master_addr} ({error.strerror}); "
            "export MASTER_ADDR with a name or number that every machine reaches (jobs of Slurm: "
            "in slurm/site.env)"
        ) from None
    if gloo and env.local_size < env.world_size and "GLOO_SOCKET_IFNAME" not in os.environ:
        _check_own_name(host)


def _check_own_name(host: str) -> None:
    """Raises UserError if gloo would announce a loopback address.

    gloo announces the address of the machine's own name, or a loopback if it has none.
    """
    try:
        addresses = _resolve(host)
        if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
            return
        reason = f"resolves to {', '.join(sorted(addresses))} on the machine itself"
    except socket.gaierror as error:
        reason = f"cannot be resolved ({error.strerror})"
    raise UserError(
        f"the name of this machine, {host}, {reason}, so that ranks of other machines cannot "
        "connect to its ranks over gloo; export GLOO_SOCKET_IFNAME with its network interface "
        "(`ip -brief addr` lists them; jobs of Slurm: in slurm/site.env)"
    )


def _resolve(name: str) -> set[str]:
    """Returns the addresses of a host name; raises socket.gaierror if it has none."""
    for pause in (*_RETRY_SECONDS, None):
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            return {str(address[4][0]).partition("%")[0] for address in found}
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or pause is None:
                raise
            time.sleep(pause)
    raise AssertionError
