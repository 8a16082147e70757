"""Finetune a model: the verb `megatrain finetune`, and the script that launchers start.

    megatrain finetune CONFIG [section.key=value ...]
    deepspeed --num_gpus 8 megatrain/finetune.py CONFIG [section.key=value ...]

The same run as pretraining's, with other data: see `pretrain.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # As in pretrain.py: not a script's folder but its parent belongs on the path.
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _folder]
    if str(_folder.parent) not in sys.path:
        sys.path.insert(0, str(_folder.parent))

from megatrain import pretrain
from megatrain.config.loader import load
from megatrain.distributed.env import from_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    pretrain.add_arguments(parser)
    parser.add_argument(
        "--show-sample",
        action="store_true",
        help="print the first samples with what is learnt marked, and start nothing",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="add the newest checkpoint's adapters to the model they stand on, as RUN/merged, and start nothing",
    )


def run(args: argparse.Namespace) -> int:
    """Finetune; returns the exit code."""
    if args.merge:
        return merge(args)
    return show_sample(args) if args.show_sample else pretrain.train(args, verb="finetune")


def show_sample(args: argparse.Namespace, *, count: int = 3) -> int:
    """Print the first samples of the training data as they are learnt; returns the exit code."""
    from megatrain.training.task_sft import show

    for text in show(load(args.config, args.overrides), count=count, colour=sys.stdout.isatty()):
        print(text)
    return 0


def merge(args: argparse.Namespace) -> int:
    """Write a LoRA run's model without adapters; returns the exit code."""
    from megatrain.checkpoint.merge_adapter import merge_run

    place = from_environment(os.environ)
    if place is not None and place.rank != 0:
        return 0  # under a launcher one of its processes is enough
    print(f"merged into {merge_run(load(args.config, args.overrides))}")
    return 0


if __name__ == "__main__":
    sys.exit(pretrain.main(verb="finetune"))
