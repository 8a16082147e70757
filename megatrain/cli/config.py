"""`megatrain config [CONFIG [section.key=value ...]]`: prints all settings or a resolved config."""

from __future__ import annotations

import argparse

from megatrain.config import documentation, loader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file of a run (default: all defaults)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the YAML"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the reference of settings as Markdown"
    )


def run(args: argparse.Namespace) -> int:
    """Prints YAML, or Markdown with --markdown."""
    if args.markdown:
        text = documentation.to_markdown()
    elif args.config:
        text = loader.to_yaml(loader.load(args.config, args.overrides))
    else:
        text = documentation.to_commented_yaml()
    print(text, end="")
    return 0
