"""The command line: `megatrain VERB ...`. Each verb lives in a module that is imported when its verb is used.

So `megatrain --help` needs no torch. A verb's module has `add_arguments(parser)` and `run(args) -> int`.
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

from megatrain import __version__
from megatrain.distributed.env import is_local_rank_zero
from megatrain.errors import UserError


class Command(NamedTuple):
    """A verb's module and what it does."""

    module: str
    help: str


VERBS = {
    "tokenizer": Command("megatrain.cli.train_tokenizer", "train a tokenizer on text files"),
    "preprocess": Command("megatrain.cli.preprocess", "turn text files into an indexed dataset"),
    "check": Command(
        "megatrain.cli.check", "see whether a run can start on its machines, before the queue"
    ),
    "pretrain": Command("megatrain.cli.train", "train a model from a config"),
    "finetune": Command("megatrain.cli.train", "finetune a model on chats, preferences or labels"),
    "schedule": Command("megatrain.cli.schedule", "simulate and draw a pipeline schedule"),
    "profile": Command("megatrain.cli.profile", "show where a run's time went, with advice"),
    "report": Command(
        "megatrain.cli.report", "a run's curves, events and times as one page, on any device"
    ),
    "convert": Command("megatrain.cli.convert", "turn a checkpoint into another kind, proven"),
    "evaluate": Command(
        "megatrain.cli.evaluate",
        "measure a model: perplexity, multiple choice, labels, lm-evaluation-harness",
    ),
    "inspect": Command(
        "megatrain.cli.inspect", "see what a checkpoint holds, and whether it is whole"
    ),
    "generate": Command("megatrain.cli.generate", "let a model go on with a text"),
    "config": Command(
        "megatrain.cli.config", "show every setting and its meaning, or a config as it resolves"
    ),
}

RENAMED_COMMANDS = {"xray": "profile"}
"""Commands of older versions and their names today."""


def main(argv: list[str] | None = None) -> int:
    """Run the verb that `argv` (the process's own arguments when None) begins with; returns the exit code."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, where a reader that is gone is noticed without a complaint of Python's
    except BrokenPipeError:
        if not (gone := _without_reader()):
            raise  # it was another pipe or connection
        for descriptor in gone:  # what is still to be written goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return _READER_GONE


_READER_GONE = 128 + 13
"""What a shell shows of a command that SIGPIPE ended, as it ends most whose reader (`| head`) has seen enough."""


_SECONDS_FOR_WORDS = 10.0
"""How long a silent rank stays: a launcher ends all ranks when the first has ended, and that is to be the one that says why."""


def _without_reader() -> list[int]:
    """Of standard output and standard error, those that are pipes which nobody reads any more."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return [
        descriptor
        for descriptor, events in poll.poll(0)
        if events & (select.POLLERR | select.POLLHUP)
    ]


def _run(words: list[str]) -> int:
    try:
        if not words or words[0].startswith("-"):
            return _without_command(words)
        if words[0] in RENAMED_COMMANDS:
            new = RENAMED_COMMANDS[words[0]]
            print(f"`megatrain {words[0]}` was renamed: use `megatrain {new}`", file=sys.stderr)
            return 2
        return _run_command(words[0], words[1:])
    except UserError as error:
        if is_local_rank_zero(os.environ):
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(_SECONDS_FOR_WORDS)
        return 1
    except OSError as error:
        if error.filename is None or isinstance(error, FileNotFoundError | ConnectionError):
            raise
        print(
            f"error: {error.filename}: {error.strerror}", file=sys.stderr
        )  # a matter of rights, room or names, and not of ours
        return 1
    except KeyboardInterrupt:
        return 130


def _without_command(words: list[str]) -> int:
    verbs = "\n".join(f"  {name:12}{verb.help}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="megatrain",
        usage="megatrain VERB ...",
        allow_abbrev=False,
        description="Train large transformers in parallel over layers, tensors and data.",
        epilog=f"verbs:\n{verbs}\n\n`megatrain VERB --help` explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatrain {__version__}")
    parser.parse_args(words)
    parser.print_help(sys.stderr)
    return 2


def _run_command(name: str, words: list[str]) -> int:
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else "known are " + ", ".join(VERBS)
        raise UserError(f"`{name}` is not a verb; {hint}")
    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    parser = argparse.ArgumentParser(
        prog=f"megatrain {name}", description=verb.help, allow_abbrev=False
    )
    parser.set_defaults(command=name)
    module.add_arguments(parser)
    # Intermixed: options may stand between a config and its overrides.
    code: int = module.run(parser.parse_intermixed_args(words))
    return code


if __name__ == "__main__":
    sys.exit(main())
