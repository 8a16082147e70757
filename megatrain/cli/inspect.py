"""`megatrain inspect CHECKPOINT`: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, a run (its best one, else its newest), or whatever `megatrain convert` reads",
    )
    parser.add_argument(
        "--hashes",
        action="store_true",
        help="read every byte of a checkpoint of ours, not sizes alone",
    )
    parser.add_argument("--json", action="store_true", help="print all of it as JSON, no table")
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="Hugging Face config of the model, for a folder without one",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 1 when the checkpoint is not whole."""
    from megatrain.conversion.detect_format import Hints
    from megatrain.conversion.inspect import as_json, describe, inspect

    found = inspect(args.checkpoint, Hints(config=args.config), hashes=args.hashes)
    print(as_json(found) if args.json else "\n".join(describe(found)))
    return 0 if found.whole else 1
