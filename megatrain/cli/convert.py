"""`megatrain convert SOURCE TARGET`: convert a model to another format."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a megatrain checkpoint or run, a Hugging Face folder, a Megatron-LM checkpoint, "
        "or a DeepSpeed universal checkpoint",
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="a new or empty folder")
    parser.add_argument(
        "--to",
        choices=["hf", "checkpoint"],
        help="a Hugging Face folder, or a checkpoint that a run resumes from "
        "(default: checkpoint for Hugging Face and universal sources, hf for others)",
    )
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32"],
        help="dtype of the weights (default: the source's)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default=5 * 10**9,
        metavar="SIZE",
        help="largest size of a file, such as 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder of the target's tokenizer (default: the source's)",
    )
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="Hugging Face config of the model, for a source without one",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="vocabulary size without padding, for a Megatron-LM checkpoint "
        "(default: --config's, the tokenizer's, or all rows)",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="skip the comparison of source and target",
    )


def run(args: argparse.Namespace) -> int:
    """Converts and prints the result; returns the exit code."""
    from megatrain.conversion.convert import convert

    convert(
        args.source,
        args.target,
        to=args.to,
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_size,
        verify=not args.no_verify,
        config=args.config,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        log=lambda line: print(line, flush=True),
    )
    return 0


def parse_size(text: str) -> int:
    """Returns the bytes of "500MB", "5GB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    unit = "" if match is None else next((u for u in (match[2], f"{match[2]}B") if u in _UNITS), "")
    if match is None or (match[2] and not unit):
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 5GB or 500MB")
    size = int(float(match[1]) * _UNITS[unit])
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1 byte")
    return size
