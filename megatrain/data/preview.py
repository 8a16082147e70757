"""Samples as training sees them: their text, with the tokens that have a loss highlighted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np

from megatrain.data.chat_format import BadSample
from megatrain.data.chat_preprocess import SFTSpec, encode_record
from megatrain.data.chat_template import ChatTemplate, EncodedChat
from megatrain.data.records import RecordProblem, parse_objects
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import DataError

_GREEN, _PLAIN = "\x1b[32;1m", "\x1b[0m"


def preview_samples(path: str, spec: SFTSpec, *, count: int, colour: bool) -> Iterator[str]:
    """Yields a description and the text of the first `count` samples of a file, folder or glob.

    Tokens with a loss are green if `colour` is set, else between « and ».

    Raises:
        DataError: a record is not valid.
    """
    template = ChatTemplate(spec.tokenizer, file=spec.chat_template)
    max_tokens = spec.sequence_length + 1
    for location, chat in islice(_samples(path, template, spec), count):
        visible = EncodedChat(chat.tokens[:max_tokens], chat.loss_mask[:max_tokens])
        num_tokens, num_loss = len(chat.tokens), int(chat.loss_mask[1:].sum())
        description = f"{location}: {num_tokens} tokens, loss on {num_loss} of them"
        if num_tokens > max_tokens:
            description += (
                f"; longer than data.sequence_length={spec.sequence_length}, shown truncated "
                f"(data.too_long={spec.too_long})"
            )
        yield f"{description}\n{highlight_loss(visible, template, colour=colour)}\n"


def highlight_loss(chat: EncodedChat, template: ChatTemplate, *, colour: bool) -> str:
    """Returns the text of the tokens; those with a loss are green, or between « and »."""
    before, after = (_GREEN, _PLAIN) if colour else ("«", "»")
    bounds = [0, *(np.flatnonzero(np.diff(chat.loss_mask)) + 1).tolist(), len(chat.tokens)]
    pieces = []
    for start, stop in pairwise(bounds):
        text = template.tokenizer.decode(chat.tokens[start:stop].tolist())
        pieces.append(f"{before}{text}{after}" if chat.loss_mask[start] else text)
    return "".join(pieces)


def _samples(path: str, template: ChatTemplate, spec: SFTSpec) -> Iterator[tuple[str, EncodedChat]]:
    for block in read_blocks(find_inputs([path]).files, field=None):
        records, problems = parse_objects(block)
        for number, record in records:
            if problems and problems[0].number < number:
                break
            try:
                chats = encode_record(record, template, spec)
            except BadSample as error:
                problem = RecordProblem(block.path, block.form, number, str(error))
                raise DataError(str(problem)) from None
            for chat in chats:
                yield f"{block.path}, {block.form} {number}", chat
        if problems:
            raise DataError(str(problems[0]))
