"""`megatrain tokenizer INPUT... --vocab-size N --output DIR`: train a tokenizer."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders or globs of JSONL, text or parquet",
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="tokens in the vocabulary, 257 or more"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to save the tokenizer in"
    )
    parser.add_argument(
        "--field", default="text", help="field or column that holds the text (default: %(default)s)"
    )
    parser.add_argument(
        "--special-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="a token that is never split; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Train, save, and print what came of it."""
    from megatrain.data.tokenizer import train_tokenizer

    made = train_tokenizer(
        args.inputs,
        vocab_size=args.vocab_size,
        output=args.output,
        field=args.field,
        special_tokens=args.special_token,
    )
    print(
        f"{made.folder}: a vocabulary of {made.vocab_size} tokens from {made.documents} documents"
    )
    if made.vocab_size < args.vocab_size:
        print(
            f"the text has no more pairs to merge, so that --vocab-size {args.vocab_size} was not reached"
        )
    return 0
