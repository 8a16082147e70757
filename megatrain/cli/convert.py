"""`megatrain convert SOURCE TARGET`: a model from one kind of folder into another, proven before it appears."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a checkpoint or run of ours, a Hugging Face folder, "
        "a checkpoint of Megatron-LM (mp_rank_XX), or a universal one of DeepSpeed",
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write; new or empty")
    parser.add_argument(
        "--to",
        choices=["hf", "checkpoint"],
        help="a clean Hugging Face folder, or a checkpoint that a run resumes "
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
        help="largest file, such as 500MB; a huge one makes one file (default: 5GB)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder of the tokenizer to put beside the model (default: the source's)",
    )
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="Hugging Face config of the same model, for a source without one",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="vocabulary without its padding, for a Megatron-LM checkpoint "
        "(default: --config's, the tokenizer's, or all rows)",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="publish without comparing hashes and logits of source and target",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print what was found."""
    from megatrain.conversion.convert import ConversionRequest, convert

    request = ConversionRequest(
        args.source,
        args.target,
        to=args.to,
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_size,
        verify=not args.no_verify,
        config=args.config,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
    )
    convert(request, say=lambda line: print(line, flush=True))
    return 0


def parse_size(text: str) -> int:
    """Bytes of "500MB", "5GB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    if match is None or (match[2] and match[2] not in _UNITS and f"{match[2]}B" not in _UNITS):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    size = int(float(match[1]) * _UNITS.get(match[2], _UNITS.get(f"{match[2]}B", 1)))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size from 1 byte")
    return size
