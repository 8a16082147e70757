"""`megatrain inspect CHECKPOINT`: describe a checkpoint and check that it is complete."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, a run (its best checkpoint, else its newest), "
        "or any source of `megatrain convert`",
    )
    parser.add_argument(
        "--hashes",
        action="store_true",
        help="check the content of a megatrain checkpoint's files, not only their sizes",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="Hugging Face config of the model, for a folder without one",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 1 if the checkpoint is incomplete or damaged."""
    from megatrain.conversion.detect_format import Hints
    from megatrain.conversion.inspect import format_report, inspect, to_json

    report = inspect(args.checkpoint, Hints(config=args.config), hashes=args.hashes)
    print(to_json(report) if args.json else "\n".join(format_report(report)))
    return 0 if report.whole else 1
