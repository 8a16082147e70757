"""Finetune a model: the verb `megatrain finetune`, and the script that launchers start.

    megatrain finetune CONFIG [section.key=value ...]
    deepspeed --num_gpus 8 megatrain/finetune.py CONFIG [section.key=value ...]

The same run as pretraining's, with other data: see `pretrain.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # As in pretrain.py: not a script's folder but its parent belongs on the path.
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _folder]
    if str(_folder.parent) not in sys.path:
        sys.path.insert(0, str(_folder.parent))

from megatrain import pretrain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    pretrain.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Finetune; returns the exit code."""
    return pretrain.train(args, verb="finetune")


if __name__ == "__main__":
    sys.exit(pretrain.main(verb="finetune"))
