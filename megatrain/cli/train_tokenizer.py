"""`megatrain train-tokenizer INPUT... --vocab-size N --output DIR`: trains a tokenizer."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders or globs of JSONL, text or parquet",
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="tokens in the vocabulary, at least 257"
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
    """Trains and saves a tokenizer and prints its size; returns the exit status."""
    from megatrain.data.tokenizer import train_tokenizer

    trained = train_tokenizer(
        args.inputs,
        vocab_size=args.vocab_size,
        output=args.output,
        field=args.field,
        special_tokens=args.special_token,
    )
    print(
        f"{trained.folder}: a vocabulary of {trained.vocab_size} tokens "
        f"from {trained.documents} documents"
    )
    if trained.vocab_size < args.vocab_size:
        print(
            f"--vocab-size {args.vocab_size} was not reached: the texts have no more pairs to merge"
        )
    return 0
