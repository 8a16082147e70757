"""Pretrain a model: the verb `megatrain pretrain`, and the script that launchers start.

megatrain pretrain CONFIG [section.key=value ...]
torchrun --nproc-per-node 8 megatrain/pretrain.py CONFIG [section.key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # A script's folder comes first on the path, where our module names would hide others'; its parent belongs there.
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _folder]
    if str(_folder.parent) not in sys.path:
        sys.path.insert(0, str(_folder.parent))

from megatrain.config.loader import Config, load
from megatrain.distributed import device
from megatrain.distributed.env import from_environment
from megatrain.errors import ConfigError
from megatrain.launch.local import run_local
from megatrain.launch.worker import start_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="the run's YAML")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings laid over the YAML"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run would be, and start nothing"
    )
    # The deepspeed launcher adds it for scripts that cannot read LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Pretrain; returns the exit code."""
    return train(args, verb="pretrain")


def train(args: argparse.Namespace, *, verb: Literal["pretrain", "finetune"]) -> int:
    """Train on the ranks that a launcher started, or start those that the layout asks for; returns the exit code."""
    config = load(args.config, args.overrides)
    place = from_environment(os.environ)
    world_size = place.world_size if place else local_world_size(config)
    device.set_environment(place.local_size if place else world_size)
    # Imports torch, so it comes after the environment is set.
    from megatrain.training.checks import check_without_ranks, dry_run
    from megatrain.training.loop import VERBS, task_of

    work, task = VERBS[verb], task_of(config, verb)
    if args.dry_run:
        print(dry_run(config, task))
        return 0
    if place is not None and config.run.max_restarts:
        raise ConfigError(
            "run.max_restarts",
            config.run.max_restarts,
            "is for ranks that megatrain starts itself, and a launcher started these",
            "set it to 0, and use the launcher's own: torchrun --max-restarts, #SBATCH --requeue",
        )
    if place is not None:
        return start_rank(work, config, place)
    check_without_ranks(config, world_size, task)
    return run_local(work, config, world_size=world_size)


def local_world_size(config: Config) -> int:
    """Ranks to start without a launcher: one replica, or as many as the config names."""
    return config.model_ranks * (config.parallel.data or 1)


def main(argv: list[str] | None = None, *, verb: str = "pretrain") -> int:
    """Run the verb with `argv`, the process's own arguments when None; returns the exit code."""
    from megatrain.__main__ import main as run_verb

    return run_verb([verb, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
