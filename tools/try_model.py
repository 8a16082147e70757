"""Loads a run's newest checkpoint in plain transformers; prints its perplexity and a sample.

    python tools/try_model.py RUN [--prompt TEXT] [--tokens N]

The validation perplexity is printed beside the trainer's. Exits with 1 if they differ by more than
rounding: the checkpoint then does not contain the model that was trained.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from megatrain.checkpoint.manifest import find_newest
from megatrain.checkpoint.retention import step_number
from megatrain.config import loader as configuration
from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch, DataLoader
from megatrain.data.gpt_dataset import open_dataset
from megatrain.errors import UserError
from megatrain.telemetry.metrics import FILE_NAME

RELATIVE_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}


def main(argv: list[str] | None = None) -> int:
    """Prints both perplexities and the sample; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--prompt", default="import os\n\n\ndef ", help="text that the sample continues"
    )
    parser.add_argument("--tokens", type=int, default=60, help="length of the sample")
    args = parser.parse_args(argv)
    try:
        return compare(args.run, args.prompt, args.tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compare(run: Path, prompt: str, tokens: int) -> int:
    """Prints the comparison of `main`; returns the exit status.

    Raises:
        UserError: the run has no checkpoint or no validation loss.
    """
    config = configuration.load(run / "config.yaml")
    checkpoint, _ = find_newest(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{run} contains no complete checkpoint")
    trainers = trainers_loss(run, step=step_number(checkpoint))
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    print(
        f"{checkpoint} in transformers: {type(model).__name__}, "
        f"{model.num_parameters():,} parameters\n"
    )
    if configuration.has_tokenizer(str(checkpoint)):
        print(sample(model, AutoTokenizer.from_pretrained(checkpoint), prompt, tokens) + "\n")
    plain = validation_loss(model, config)
    print(
        f"validation perplexity  {math.exp(plain):.3f} in transformers, "
        f"{math.exp(trainers):.3f} in the run"
    )
    if abs(plain / trainers - 1) > RELATIVE_TOLERANCE[config.train.dtype]:
        print(
            f"error: losses {plain:.6f} and {trainers:.6f} differ by more than rounding",
            file=sys.stderr,
        )
        return 1
    return 0


def trainers_loss(run: Path, *, step: int) -> float:
    """Returns the validation loss of `step` in the run's metrics; UserError if there is none."""
    for line in reversed(
        [json.loads(line) for line in (run / FILE_NAME).read_text(encoding="utf-8").splitlines()]
    ):
        if line["step"] == step and "valid_loss" in line:
            return float(line["valid_loss"])
    raise UserError(
        f"{run / FILE_NAME} has no validation loss of step {step}, that of the newest checkpoint"
    )


@torch.inference_mode()
def validation_loss(model: torch.nn.Module, config: Config) -> float:
    """Returns the mean loss per token over the validation batches of the run."""
    samples = open_dataset(
        config.data,
        part="valid",
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
        vocab_size=model.config.vocab_size,
    )
    loader = DataLoader(
        samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=0,
        data_size=1,
    )
    batches: list[Batch] = [
        batch for number in range(config.eval.batches) for batch in loader.microbatches(number)
    ]
    loader.close()
    losses = [
        torch.nn.functional.cross_entropy(
            model(batch.tokens).logits.flatten(0, 1), batch.labels.flatten()
        )
        for batch in batches
    ]
    return float(torch.stack(losses).double().mean())


def sample(model: torch.nn.Module, tokenizer: object, prompt: str, tokens: int) -> str:
    """Returns the prompt with a continuation that is drawn with a fixed seed."""
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=50
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
