"""Which rank this process is, read from what a launcher left in the environment.

torchrun, deepspeed and accelerate say it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun says it in
SLURM_* and names no meeting point: the first host of the step is taken, and a port that follows from the job id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megatrain.errors import UserError


class RankEnv(NamedTuple):
    """One rank's place in a run and where its ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int


def from_environment(environ: Mapping[str, str]) -> RankEnv | None:
    """The place a launcher gave this process, None outside a launcher; UserError when only part of it is there."""
    if "RANK" in environ:
        return _from_torchrun(environ)
    if _inside_srun(environ):
        return _from_srun(environ)
    if "LOCAL_RANK" in environ:
        raise UserError(
            "RANK is missing from the environment although LOCAL_RANK is set: a launcher sets both; unset LOCAL_RANK "
            "to start without one"
        )
    return None


def is_local_rank_zero(environ: Mapping[str, str]) -> bool:
    """False for all ranks but one of each machine: what all of them would say before they meet is said once."""
    return environ.get("LOCAL_RANK" if "RANK" in environ else "SLURM_LOCALID", "0") == "0"


def attempt(environ: Mapping[str, str]) -> int:
    """How often this run has been started by Slurm (1 and its requeues) and by torch's elastic launcher within that."""
    counts = (
        environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    )
    return 1 + sum(int(count) for count in counts if count.isdigit())


def _from_torchrun(environ: Mapping[str, str]) -> RankEnv:
    launcher = "the launcher's RANK is"
    world_size = _number(environ, "WORLD_SIZE", launcher)
    # LOCAL_SIZE is deepspeed's word for LOCAL_WORLD_SIZE.
    local_name = next(
        (name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), "WORLD_SIZE"
    )
    return _checked(
        RankEnv(
            rank=_number(environ, "RANK", launcher),
            world_size=world_size,
            local_rank=_number(environ, "LOCAL_RANK", launcher),
            local_size=_number(environ, local_name, launcher),
            master_addr=_text(environ, "MASTER_ADDR", launcher),
            master_port=_number(environ, "MASTER_PORT", launcher),
        )
    )


# Slurm numbers its own steps (batch script, interactive shell, extern) downwards from 0xFFFFFFFE.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def _inside_srun(environ: Mapping[str, str]) -> bool:
    """True for a task of srun; False in a batch script, under salloc, and in the shell of `srun --pty`."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_PTY_PORT" not in environ


def _from_srun(environ: Mapping[str, str]) -> RankEnv:
    launcher = "srun's SLURM_STEP_ID is"
    rank = _number(environ, "SLURM_PROCID", launcher)
    world_size = _number(environ, "SLURM_NTASKS", launcher)
    node_list = environ.get("SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST", launcher)
    job = environ.get("SLURM_JOB_ID", "0")
    # Below the ports that kernels hand out; a job may run several steps side by side, so the step counts too.
    port = (
        20000 + (int(job) * 16 + int(environ["SLURM_STEP_ID"])) % 12000 if job.isdigit() else 20000
    )
    return _checked(
        RankEnv(
            rank=rank,
            world_size=world_size,
            local_rank=_number(environ, "SLURM_LOCALID", launcher),
            local_size=_tasks_here(environ, world_size),
            master_addr=environ.get("MASTER_ADDR") or next(expand_hosts(node_list)),
            master_port=int(environ.get("MASTER_PORT") or port),
        )
    )


def _tasks_here(environ: Mapping[str, str], world_size: int) -> int:
    """Tasks on this node, from SLURM_STEP_TASKS_PER_NODE such as "4(x2),1"; the whole world when it is not given."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else world_size


def expand_hosts(node_list: str) -> Iterator[str]:
    """Host names of a Slurm node list, in order: "a[1-3,7],b" gives a1 a2 a3 a7 b."""
    # Commas inside brackets separate numbers, those outside separate names.
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        yield from _expanded(name)


def _expanded(name: str) -> Iterator[str]:
    before, bracket, rest = name.partition("[")
    if not bracket:
        yield name
        return
    inside, _, after = rest.partition("]")
    for part in inside.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            # "08-10" counts 08 09 10: the width of the first number is kept.
            for tail in _expanded(after):
                yield f"{before}{number:0{len(first)}d}{tail}"


def _text(environ: Mapping[str, str], name: str, launcher: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise UserError(
            f"{name} is missing from the environment although {launcher} set: start all ranks with one launcher"
        )
    return value


def _number(environ: Mapping[str, str], name: str, launcher: str) -> int:
    value = _text(environ, name, launcher)
    if not value.isdigit():
        raise UserError(f"{name}={value} in the environment is not a whole number")
    return int(value)


def _checked(place: RankEnv) -> RankEnv:
    if not place.rank < place.world_size:
        raise UserError(
            f"rank {place.rank} in the environment is not below the world's {place.world_size} ranks"
        )
    if not place.local_rank < max(place.local_size, 1):
        raise UserError(
            f"local rank {place.local_rank} in the environment is not below its machine's {place.local_size} ranks"
        )
    return place
