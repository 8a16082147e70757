"""`megatrain config [CONFIG [section.key=value ...]]`: the settings and their meaning, or a config as it resolves."""

from __future__ import annotations

import argparse

from megatrain.config import loader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a run's YAML; every default when left out"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings laid over the YAML"
    )


def run(args: argparse.Namespace) -> int:
    """Print valid YAML."""
    print(
        loader.to_yaml(loader.load(args.config, args.overrides))
        if args.config
        else loader.describe(),
        end="",
    )
    return 0
