"""`megatrain evaluate MODEL DATA`: measure a model."""

from __future__ import annotations

import argparse
import re

_OVERRIDE = re.compile(r"[a-z_]+\.[a-z_.]+=")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint, a Hugging Face folder, or a run (its best checkpoint, else its newest)",
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="DATA|section.key=value",
        help="text, JSONL or parquet files, or an indexed dataset's prefix; "
        "settings such as parallel.tensor=2",
    )
    parser.add_argument(
        "--kind",
        choices=["perplexity", "choices", "classification"],
        help="what to measure (default: follows from model and data)",
    )
    parser.add_argument(
        "--window",
        type=int,
        help="tokens that the model sees at once (default: its positions, up to 2048)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens that each window after a document's first scores (default: 512)",
    )
    parser.add_argument(
        "--field",
        default="text",
        help="field with the text, in JSONL and parquet files (default: %(default)s)",
    )
    parser.add_argument(
        "--tasks",
        help="comma-separated tasks of lm-evaluation-harness, instead of DATA; "
        "requires megatrain[eval]",
    )
    parser.add_argument("--include-path", metavar="FOLDER", help="folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question of a task")
    parser.add_argument(
        "--json", action="store_true", help="print the results file and nothing else"
    )
    # The deepspeed launcher adds it for scripts that cannot read LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Evaluates on a launcher's ranks or on local ones; returns the exit code."""
    from megatrain.evaluation.run import evaluate

    evaluate(
        args.model,
        [argument for argument in args.arguments if not _OVERRIDE.match(argument)],
        kind=args.kind,
        window=args.window,
        stride=args.stride,
        field=args.field,
        tasks=args.tasks.split(",") if args.tasks else (),
        include_path=args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        overrides=[argument for argument in args.arguments if _OVERRIDE.match(argument)],
        as_json=args.json,
    )
    return 0
