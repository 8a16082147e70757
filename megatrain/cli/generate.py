"""`megatrain generate CHECKPOINT --prompt TEXT`: let a model go on with a text, through transformers.

On a CPU with room for it the model is loaded plainly; with GPUs, or where it is larger than memory, accelerate spreads it over
devices, memory and disk.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_ROOM = 0.9
"""Share of a CPU's free memory that weights may take."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    from megatrain.cli.convert import parse_size

    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, a run (its best one, else its newest) or a Hugging Face folder",
    )
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="what to go on from; - reads it from standard input",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message, in the tokenizer's chat template",
    )
    parser.add_argument(
        "--max-new-tokens", type=_count, default=100, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=1.0,
        metavar="T",
        help="0 takes the likeliest token each time (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=_count, metavar="K", help="draw from the K likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=_share,
        metavar="P",
        help="draw from the likeliest tokens that have P of the probability (default: all)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the same seed draws the same text (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], help="arithmetic (default: the checkpoint's)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder of the tokenizer (default: the checkpoint's)",
    )
    parser.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="CPU memory for weights; what does not fit is read from disk "
        "(default: most of what is free)",
    )


def run(args: argparse.Namespace) -> int:
    """Print prompt and continuation as they come."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # transformers imports it, and it speaks of kernels that nothing here uses
    import torch
    from transformers import TextStreamer, set_seed

    from megatrain.conversion.folders import model_folder
    from megatrain.data.tokenizer import load_tokenizer

    folder = model_folder(args.checkpoint)
    tokenizer = load_tokenizer(args.tokenizer or folder)
    inputs = _inputs(
        tokenizer, sys.stdin.read() if args.prompt == "-" else args.prompt, chat=args.chat
    )
    with tempfile.TemporaryDirectory(prefix="megatrain-generate-") as spare:
        model = load_model(folder, dtype=args.dtype, memory=args.memory, spare=spare)
        _check_room(model.config, inputs["input_ids"].shape[1], args.max_new_tokens)
        set_seed(args.seed)
        drawing: dict[str, Any] = {"do_sample": False}
        if args.temperature > 0:
            drawing = {
                "do_sample": True,
                "temperature": args.temperature,
                "top_k": args.top_k or 0,
                "top_p": args.top_p or 1.0,
            }
        with torch.inference_mode():
            model.generate(
                **inputs.to("cuda" if torch.cuda.is_available() else "cpu"),
                max_new_tokens=args.max_new_tokens,
                streamer=TextStreamer(tokenizer, skip_special_tokens=True),
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
                **drawing,
            )
    return 0


def _inputs(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    from megatrain.errors import ConfigError, DataError

    if chat and tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer in {tokenizer.name_or_path} has no chat template; leave --chat out"
        )
    if chat:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError(
            "--prompt", repr(prompt), "holds no token", "give some text to go on from"
        )
    return inputs


def _check_room(config: Any, prompt: int, new: int) -> None:
    from megatrain.errors import ConfigError

    most = getattr(config, "max_position_embeddings", None)
    if most is not None and prompt + new > most:
        raise ConfigError(
            "--max-new-tokens",
            new,
            f"is too many after a prompt of {prompt} tokens: the model has {most} positions",
            f"use at most {max(0, most - prompt)}",
        )


def load_model(
    folder: Path, *, dtype: str | None, memory: int | None, spare: str
) -> torch.nn.Module:
    """transformers' model of the folder, on one device or spread; `spare` is a folder for what fits nowhere else."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from megatrain.checkpoint.hf_folder import HFFolder
    from megatrain.errors import CheckpointError
    from megatrain.ops.dtypes import DTYPES

    disable_progress_bar()
    tensors = HFFolder(folder)  # says what is wrong with a damaged folder
    size = sum(tensors.nbytes(name) for name in tensors.names())
    wanted = "auto" if dtype is None else DTYPES[dtype]
    where: dict[str, Any] = {}
    limit = memory if memory is not None else int(_free_memory() * _ROOM)
    if torch.cuda.is_available() or size > limit:
        where = {"device_map": "auto", "offload_folder": spare}
        if memory is not None:
            where["max_memory"] = {
                **{
                    number: torch.cuda.mem_get_info(number)[0]
                    for number in range(torch.cuda.device_count())
                },
                "cpu": memory,
            }
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, local_files_only=True, **where
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded by transformers: {' '.join(str(error).split())[:300]}"
        ) from None
    return model.eval()


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature from 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in (0, 1]")
    return value
