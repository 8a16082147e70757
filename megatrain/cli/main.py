"""The command line: `megatrain COMMAND ...`.

The module of a command is imported only when the command runs, so that `megatrain --help` needs no
torch. It has `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import select
import sys
import time
from typing import NamedTuple

from megatrain.distributed.env import is_local_rank_zero
from megatrain.errors import RankError, UserError
from megatrain.version import __version__


class Command(NamedTuple):
    """The module of a command and its help text."""

    module: str
    help: str


COMMANDS = {
    "train-tokenizer": Command(
        "megatrain.cli.train_tokenizer", "train a BPE tokenizer on text files"
    ),
    "preprocess": Command("megatrain.cli.preprocess", "tokenize text files into a dataset"),
    "check": Command("megatrain.cli.check", "check a run before it waits in the queue"),
    "pretrain": Command("megatrain.cli.train", "train a model from a config"),
    "finetune": Command("megatrain.cli.train", "finetune a model on chats, preferences or labels"),
    "evaluate": Command(
        "megatrain.cli.evaluate",
        "measure perplexity, multiple choice, classification, lm-evaluation-harness",
    ),
    "schedule": Command("megatrain.cli.schedule", "simulate and draw a pipeline schedule"),
    "profile": Command("megatrain.cli.profile", "show where the time of traced steps went"),
    "report": Command("megatrain.cli.report", "write curves, events and times as one HTML page"),
    "convert": Command("megatrain.cli.convert", "convert a checkpoint to another format"),
    "inspect": Command("megatrain.cli.inspect", "list the contents of a checkpoint and verify it"),
    "generate": Command("megatrain.cli.generate", "generate text from a checkpoint"),
    "config": Command("megatrain.cli.config", "print all settings, or a config with overrides"),
    "completion": Command("megatrain.cli.completion", "print a completion script for a shell"),
}

ALIASES = {"tokenizer": "train-tokenizer"}
"""Other names of commands."""

RENAMED = {"xray": "profile"}
"""Commands of older versions, and their names today."""

_BROKEN_PIPE_STATUS = 128 + 13
"""Exit status of a process terminated by SIGPIPE."""

_ERROR_DELAY = 10.0
"""Seconds that the other ranks of a machine wait before they exit after the same error.

A launcher ends all ranks when the first one exits; that one should be the rank that prints.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    Args:
        argv: the command and its arguments; None for those of the process.
    """
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # so that a closed pipe raises BrokenPipeError inside this block
    except BrokenPipeError:
        if not (closed := _closed_outputs()):
            raise  # another pipe or a connection
        for descriptor in closed:  # discards buffered output
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return _BROKEN_PIPE_STATUS


def make_parser(name: str) -> argparse.ArgumentParser:
    """Returns the argument parser of a command."""
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"megatrain {name}", description=command.help, allow_abbrev=False
    )
    parser.set_defaults(command=name)
    importlib.import_module(command.module).add_arguments(parser)
    return parser


def _closed_outputs() -> list[int]:
    """Returns the file descriptors of standard output and error whose reader is gone."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    closed = select.POLLERR | select.POLLHUP
    return [descriptor for descriptor, events in poll.poll(0) if events & closed]


def _run(arguments: list[str]) -> int:
    try:
        if not arguments or arguments[0].startswith("-"):
            return _print_help(arguments)
        if arguments[0] in RENAMED:
            old, new = arguments[0], RENAMED[arguments[0]]
            print(f"`megatrain {old}` was renamed: use `megatrain {new}`", file=sys.stderr)
            return 2
        return _run_command(ALIASES.get(arguments[0], arguments[0]), arguments[1:])
    except RankError as error:
        return error.exit_code
    except UserError as error:
        if is_local_rank_zero(os.environ):
            print(f"error: {error.description}", file=sys.stderr)
        else:
            time.sleep(_ERROR_DELAY)
        return 1
    except OSError as error:
        if error.filename is None or isinstance(error, FileNotFoundError | ConnectionError):
            raise
        # Permissions, disk space or names: an error of the user's environment.
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _print_help(arguments: list[str]) -> int:
    commands = "\n".join(f"  {name:17}{command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="megatrain",
        usage="megatrain COMMAND ...",
        allow_abbrev=False,
        description="Train large transformers with tensor, pipeline and data parallelism.",
        epilog=f"commands:\n{commands}\n\n`megatrain COMMAND --help` describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatrain {__version__}")
    parser.parse_args(arguments)
    parser.print_help(sys.stderr)
    return 2


def _run_command(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"commands: {', '.join(COMMANDS)}"
        raise UserError(f"`{name}` is not a command; {hint}")
    # Intermixed: options may stand between a config and its overrides.
    args = make_parser(name).parse_intermixed_args(arguments)
    code: int = importlib.import_module(COMMANDS[name].module).run(args)
    return code
