"""`megatrain evaluate MODEL DATA`: measure a model."""

from __future__ import annotations

import argparse
import functools
import os
import re
from importlib.util import find_spec
from pathlib import Path

from megatrain.cli.train import local_world_size
from megatrain.config.loader import Config
from megatrain.distributed import device
from megatrain.distributed.env import from_environment
from megatrain.errors import ConfigError, UserError
from megatrain.evaluation import spec as subjects
from megatrain.launch.local import run_local
from megatrain.launch.worker import start_rank

_SETTING = re.compile(r"[a-z_]+\.[a-z_.]+=")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint, a Hugging Face folder, or a run's folder for its newest checkpoint",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="DATA|section.key=value",
        help="text, JSONL or parquet files, or an indexed dataset's prefix; settings such as parallel.tensor=2",
    )
    parser.add_argument(
        "--kind",
        choices=["perplexity", "choices", "classification"],
        help="what to measure; by default what the data are made for",
    )
    parser.add_argument(
        "--window",
        type=int,
        help="tokens the model sees at once; its positions up to 2048 by default",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens scored by each window after a document's first; 512 by default",
    )
    parser.add_argument(
        "--field",
        default="text",
        help="of JSONL and parquet, where the text is (default: %(default)s)",
    )
    parser.add_argument(
        "--tasks",
        help="tasks of lm-evaluation-harness instead of DATA, with commas; needs megatrain[eval]",
    )
    parser.add_argument(
        "--include-path", metavar="FOLDER", help="where the harness looks for tasks beside its own"
    )
    parser.add_argument(
        "--limit", type=int, help="of each harness task, the number of documents to use"
    )
    parser.add_argument(
        "--num-fewshot", type=int, help="of each harness task, examples before each question"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the results file instead of a table, and nothing else",
    )
    # The deepspeed launcher adds it for scripts that cannot read LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Evaluate on the ranks that a launcher started, or start those that the layout asks for; returns the exit code."""
    settings = [word for word in args.words if _SETTING.match(word)]
    data = [word for word in args.words if not _SETTING.match(word)]
    _check_words(args, data)
    folder = subjects.model_folder(args.model)
    config = subjects.make_config(folder, settings)
    place = from_environment(os.environ)
    world_size = place.world_size if place else local_world_size(config)
    device.set_environment(place.local_size if place else world_size)
    # Imports torch, so it comes after the environment is set.
    from megatrain.evaluation.run import evaluate

    work = functools.partial(evaluate, subject=_subject(args, folder, data, config))
    if place is not None:
        return start_rank(work, config, place)
    return run_local(work, config, world_size=world_size)


def _subject(
    args: argparse.Namespace, folder: Path, data: list[str], config: Config
) -> subjects.EvalSpec:
    """What is evaluated, checked as far as that needs no ranks."""
    from megatrain.evaluation import checks

    architecture = checks.check_model(config)
    window, stride = checks.make_windows(
        architecture,
        window=args.window,
        stride=args.stride,
        trained=subjects.trained_length(folder),
    )
    kind = "harness" if args.tasks else checks.choose_kind(args.kind, data, architecture)
    tasks = tuple(args.tasks.split(",")) if args.tasks else ()
    return subjects.EvalSpec(
        str(folder),
        tuple(data),
        kind,
        window,
        stride,
        args.field,
        args.json,
        tasks,
        args.include_path,
        args.limit,
        args.num_fewshot,
    )


def _check_words(args: argparse.Namespace, data: list[str]) -> None:
    if args.tasks and data:
        raise ConfigError(
            "--tasks",
            args.tasks,
            f"brings its own data, and {data[0]} is given too",
            "leave one of them out",
        )
    if not args.tasks and not data:
        raise UserError(
            "there is nothing to evaluate on: give DATA (files or an indexed dataset's prefix), or --tasks"
        )
    if args.tasks and find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks", args.tasks, "needs lm-evaluation-harness", "pip install 'megatrain[eval]'"
        )
    for name in ("include_path", "limit", "num_fewshot"):
        if not args.tasks and getattr(args, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}",
                getattr(args, name),
                "is of lm-evaluation-harness",
                "give --tasks too",
            )
