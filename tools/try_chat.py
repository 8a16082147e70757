"""Compares a finetuned model with its base model on held-out questions, in plain transformers.

    python tools/try_chat.py RUN HELD_OUT [--questions N]

Prints some answers, the loss of both models on all held-out answers, and the loss on the run's
validation data beside the trainer's. Exits with 1 if the last two differ by more than rounding: the
checkpoint then does not contain the model that was trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from try_model import RELATIVE_TOLERANCE, trainers_loss

from megatrain.checkpoint.manifest import find_newest
from megatrain.checkpoint.retention import step_number
from megatrain.config import loader as configuration
from megatrain.data.chat_format import Conversation, read_conversation
from megatrain.data.chat_template import ChatTemplate, EncodedChat
from megatrain.data.records import parse_objects
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Prints losses and answers before and after finetuning; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the finetuning run's folder")
    parser.add_argument("held_out", help="file of questions that no setting was chosen by")
    parser.add_argument("--questions", type=int, default=3, help="how many answers to show")
    args = parser.parse_args(argv)
    try:
        return compare(args.run, args.held_out, args.questions)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compare(run: Path, held_out_file: str, questions: int) -> int:
    """Prints the comparison of `main`; returns the exit status.

    Raises:
        UserError: the run has no checkpoint, validation data or base model.
    """
    config = configuration.load(run / "config.yaml")
    checkpoint, _ = find_newest(run / "checkpoints")
    if (
        checkpoint is None
        or not isinstance(config.data.valid, str)
        or config.train.init_from is None
    ):
        raise UserError(
            f"{run} needs a complete checkpoint, data.valid and train.init_from for a comparison"
        )
    trainers = trainers_loss(run, step=step_number(checkpoint))
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    template = ChatTemplate(checkpoint)
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (config.train.init_from, checkpoint)
    )
    chats = read_chats(held_out_file)
    for chat in chats[:: max(1, len(chats) // max(1, questions))][:questions]:
        print(f"\n{chat.messages[0]['content']}")
        print(f"  before  {answer(before, template.tokenizer, chat.messages[:-1])}")
        print(f"  after   {answer(after, template.tokenizer, chat.messages[:-1])}")
        print(f"  wanted  {chat.messages[-1]['content']}")
    held_out, valid = (
        [template.encode(chat, train_on=config.data.train_on) for chat in some]
        for some in (chats, read_chats(config.data.valid))
    )
    plain = loss(after, valid)
    print(
        f"\nloss on {len(held_out)} held-out answers  {loss(before, held_out):.4f} before, "
        f"{loss(after, held_out):.4f} after"
    )
    print(
        f"loss on {len(valid)} validation answers  {plain:.4f} in transformers, "
        f"{trainers:.4f} in the run"
    )
    if abs(plain / trainers - 1) > RELATIVE_TOLERANCE[config.train.dtype]:
        print(
            f"error: losses {plain:.6f} and {trainers:.6f} differ by more than rounding",
            file=sys.stderr,
        )
        return 1
    return 0


def read_chats(path: str) -> list[Conversation]:
    """Returns all conversations of a file."""
    return [
        read_conversation(record)
        for block in read_blocks(find_inputs([path]).files, field=None)
        for _, record in parse_objects(block)[0]
    ]


@torch.inference_mode()
def loss(model: torch.nn.Module, chats: list[EncodedChat]) -> float:
    """Returns the mean loss over all tokens that have one."""
    total, count = 0.0, 0
    for start in range(0, len(chats), 32):
        some = chats[start : start + 32]
        # Padding follows a chat, so no token of it attends to padding.
        ids, loss_mask = (
            pad_sequence([torch.from_numpy(chat[field]) for chat in some], batch_first=True)
            for field in (0, 1)
        )
        logits = model(ids[:, :-1]).logits[loss_mask[:, 1:]]
        total += float(
            torch.nn.functional.cross_entropy(logits, ids[:, 1:][loss_mask[:, 1:]], reduction="sum")
        )
        count += len(logits)
    return total / count


def answer(model: Any, tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Returns the greedy answer of at most 40 tokens, without repeated trigrams, on one line."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=40,
        do_sample=False,
        no_repeat_ngram_size=3,
        pad_token_id=tokenizer.eos_token_id,
    )
    return json.dumps(
        tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False),
        ensure_ascii=False,
    )


if __name__ == "__main__":
    sys.exit(main())
