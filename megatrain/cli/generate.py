"""`megatrain generate CHECKPOINT --prompt TEXT`: generate text from a checkpoint with transformers.

accelerate places the model on GPUs, CPU and, if it exceeds their memory, on disk.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatrain.cli.arguments import positive_int
from megatrain.cli.convert import parse_size
from megatrain.errors import CheckpointError, ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, a run (its best checkpoint, else its newest), or a Hugging Face folder",
    )
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="text to continue; - reads standard input"
    )
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's message of a chat"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=100, metavar="N", help="default: %(default)s"
    )
    _add_sampling_arguments(parser)
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], help="dtype (default: the checkpoint's)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder (default: the checkpoint's)"
    )
    parser.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="CPU memory for weights, such as 8GB; the rest is read from disk (default: all free)",
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=1.0,
        metavar="T",
        help="0 takes the most likely token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=positive_int, metavar="K", help="sample from the K most likely tokens"
    )
    parser.add_argument(
        "--top-p",
        type=_probability,
        metavar="P",
        help="sample from the most likely tokens whose probabilities sum to P",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the sampling (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints prompt and continuation as they are generated; returns the exit code."""
    # transformers imports it, and it warns of kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    from transformers import TextStreamer, set_seed

    from megatrain.checkpoint.retention import find_model_folder
    from megatrain.data.tokenizer import load_tokenizer

    folder = find_model_folder(args.checkpoint)
    tokenizer = load_tokenizer(args.tokenizer or folder)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    inputs = _tokenize(tokenizer, prompt, chat=args.chat)
    padding = tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": args.temperature,
            "top_k": args.top_k or 0,
            "top_p": args.top_p or 1.0,
        }
    with tempfile.TemporaryDirectory(prefix="megatrain-generate-") as offload_folder:
        model = load_model(
            folder, dtype=args.dtype, memory=args.memory, offload_folder=offload_folder
        )
        _check_length(model.config, inputs["input_ids"].shape[1], args.max_new_tokens)
        set_seed(args.seed)
        with torch.inference_mode():
            model.generate(
                **inputs.to("cuda" if torch.cuda.is_available() else "cpu"),
                max_new_tokens=args.max_new_tokens,
                streamer=TextStreamer(tokenizer, skip_special_tokens=True),
                pad_token_id=tokenizer.eos_token_id if padding is None else padding,
                **sampling,
            )
    return 0


def _tokenize(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
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
        raise ConfigError("--prompt", repr(prompt), "has no token", "give some text to continue")
    return inputs


def _check_length(config: Any, prompt_length: int, new_tokens: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt_length + new_tokens > positions:
        raise ConfigError(
            "--max-new-tokens",
            new_tokens,
            f"exceeds the model's {positions} positions after a prompt of {prompt_length} tokens",
            f"use at most {max(0, positions - prompt_length)}",
        )


def load_model(folder: Path, *, dtype: str | None, memory: int | None, offload_folder: str) -> Any:
    """Loads transformers' model of a folder; weights beyond `memory` bytes are read from disk."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from megatrain.checkpoint.hf_folder import HFFolder
    from megatrain.ops.dtypes import DTYPES

    disable_progress_bar()
    HFFolder(folder)  # explains damages better than transformers
    max_memory: dict[int | str, int] | None = None
    if memory is not None:
        gpus = range(torch.cuda.device_count())
        max_memory = {**{gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus}, "cpu": memory}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else DTYPES[dtype],
            local_files_only=True,
            device_map="auto",
            max_memory=max_memory,
            offload_folder=offload_folder,
        )
    except (OSError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers cannot load {folder}: {message}") from None
    return model.eval()


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number of at least 0")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1")
    return value
