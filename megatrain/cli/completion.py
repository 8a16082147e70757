"""`megatrain completion bash`: print a script that completes commands, options and files."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "shell", choices=["bash", "zsh"], help='the shell; use: eval "$(megatrain completion bash)"'
    )


def run(args: argparse.Namespace) -> int:
    """Prints the completion script."""
    import shtab

    print(shtab.complete(make_full_parser(), shell=args.shell))
    return 0


def make_full_parser() -> argparse.ArgumentParser:
    """Returns one parser with all commands, whose file arguments complete file names."""
    import shtab

    from megatrain.cli.main import COMMANDS, make_parser

    parser = argparse.ArgumentParser(prog="megatrain")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, parents=[make_parser(name)], add_help=False
        )
        for action in sub._actions:
            takes_text = action.nargs != 0 and action.choices is None
            if takes_text and action.type is None and action.help != argparse.SUPPRESS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser
