"""`megatrain preprocess INPUT... --tokenizer DIR --output PREFIX`: writes an indexed dataset."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatrain.cli.arguments import positive_int

if TYPE_CHECKING:
    from megatrain.data.preprocess import PreprocessResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders or globs of JSONL, text or parquet",
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder of the tokenizer")
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--workers", type=positive_int, metavar="N", help="processes (default: one per core)"
    )
    parser.add_argument(
        "--field", default="text", help="field or column that holds the text (default: %(default)s)"
    )
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="if a record is not a document: stop, or skip and count it (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the dataset and prints its size and the records left out; returns the exit status."""
    from megatrain.data.preprocess import preprocess

    result = preprocess(
        args.inputs,
        tokenizer=args.tokenizer,
        output=args.output,
        workers=args.workers,
        field=args.field,
        on_error=args.on_error,
        progress=sys.stderr,
    )
    print("\n".join(describe(result)))
    return 0


def describe(result: PreprocessResult) -> list[str]:
    """Returns lines about the documents written, records skipped and files ignored."""
    lines = [
        f"{result.prefix}: {result.documents} documents, {result.tokens} tokens, "
        f"{result.bytes} bytes of text in {result.seconds:.1f} s "
        f"({result.bytes / 1e6 / result.seconds:.1f} MB/s)"
    ]
    lines += [f"skipped {count}: {reason}" for reason, count in result.skipped.most_common()]
    if result.ignored:
        lines.append(
            f"ignored {len(result.ignored)} files of other formats or links to folders, "
            f"such as {result.ignored[0]}"
        )
    return lines
