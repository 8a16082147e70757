"""`megatrain pretrain CONFIG` and `megatrain finetune CONFIG`: train a model from a config."""

from __future__ import annotations

import argparse
import os
import sys

from megatrain.config.loader import load
from megatrain.distributed import device
from megatrain.distributed.env import from_environment
from megatrain.errors import ConfigError
from megatrain.launch.local import run_local
from megatrain.launch.worker import start_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command, whose name is the default of `command`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the YAML"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the run plan and exit")
    if parser.get_default("command") == "finetune":
        parser.add_argument(
            "--show-sample",
            action="store_true",
            help="print the first samples, with the tokens in the loss marked, and exit",
        )
        parser.add_argument(
            "--merge",
            action="store_true",
            help="write the base model merged with the newest adapters to RUN/merged and exit",
        )
    # The deepspeed launcher adds it for scripts that cannot read LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Runs `pretrain` or `finetune`; returns the exit code."""
    if args.command == "finetune" and args.merge:
        return _merge(args)
    if args.command == "finetune" and args.show_sample:
        return _show_samples(args)
    return _train(args)


def _train(args: argparse.Namespace) -> int:
    """Trains on the ranks of a launcher, or starts the ranks of the layout on this machine."""
    config = load(args.config, args.overrides)
    env = from_environment(os.environ)
    world_size = env.world_size if env else config.local_world_size
    device.set_environment(env.local_size if env else world_size)
    # Imports torch, so it comes after the environment is set.
    from megatrain.training.preflight import check_start
    from megatrain.training.run import RANK_FUNCTIONS
    from megatrain.training.run_plan import dry_run
    from megatrain.training.select_task import select_task

    target, task = RANK_FUNCTIONS[args.command], select_task(config, args.command)
    if args.dry_run:
        print(dry_run(config, task))
        return 0
    if env is not None and config.run.max_restarts:
        raise ConfigError(
            "run.max_restarts",
            config.run.max_restarts,
            "requires ranks that megatrain starts itself, but a launcher started these",
            "use the restarts of the launcher: torchrun --max-restarts, #SBATCH --requeue",
            fix={"run.max_restarts": 0},
        )
    if env is not None:
        return start_rank(target, config, env)
    check_start(config, task, world_size)
    return run_local(target, config, world_size=world_size)


def _show_samples(args: argparse.Namespace, *, count: int = 3) -> int:
    from megatrain.training.task_sft import preview

    for text in preview(load(args.config, args.overrides), count=count, colour=sys.stdout.isatty()):
        print(text)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from megatrain.checkpoint.peft import merge_run

    env = from_environment(os.environ)
    if env is None or env.rank == 0:  # one process of a launcher is enough
        config = load(args.config, args.overrides)
        merged = merge_run(
            config.run.output_dir,
            lora=config.lora,
            task=config.task,
            init_from=config.train.init_from,
            resume_from=config.checkpoint.resume,
        )
        print(f"merged into {merged}")
    return 0
