"""A sample as training sees it: its text, with what is learnt marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np

from megatrain.data.chat_format import BadSample
from megatrain.data.chat_preprocess import SFTSpec, encode_record
from megatrain.data.chat_template import ChatTemplate, Encoded
from megatrain.data.records import RecordProblem, parse_objects
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import DataError

_GREEN, _PLAIN = "\x1b[32;1m", "\x1b[0m"


def preview_samples(path: str, recipe: SFTSpec, *, count: int, colour: bool) -> Iterator[str]:
    """Yield the first samples of a file, folder or glob: a line on each, then its text with «what is learnt» marked or coloured."""
    template = ChatTemplate(recipe.tokenizer, file=recipe.chat_template)
    most = recipe.sequence_length + 1
    for place, encoded in islice(_samples(path, template, recipe), count):
        cut = Encoded(encoded.tokens[:most], encoded.trained[:most])
        words = f"{place}: {len(encoded.tokens)} tokens, {int(encoded.trained[1:].sum())} of them learnt"
        if len(encoded.tokens) > most:
            words += f"; too long for data.sequence_length={recipe.sequence_length} (data.too_long={recipe.too_long}), cut here"
        yield f"{words}\n{mark(cut, template, colour=colour)}\n"


def mark(encoded: Encoded, template: ChatTemplate, *, colour: bool) -> str:
    """The text of the tokens; those that are learnt in green, or between « and »."""
    before, after = (_GREEN, _PLAIN) if colour else ("«", "»")
    bounds = [0, *(np.flatnonzero(np.diff(encoded.trained)) + 1).tolist(), len(encoded.tokens)]
    pieces = []
    for start, stop in pairwise(bounds):
        text = template.tokenizer.decode(encoded.tokens[start:stop].tolist())
        pieces.append(f"{before}{text}{after}" if encoded.trained[start] else text)
    return "".join(pieces)


def _samples(path: str, template: ChatTemplate, recipe: SFTSpec) -> Iterator[tuple[str, Encoded]]:
    for block in read_blocks(find_inputs([path]).files, field=None):
        records, problems = parse_objects(block)
        first_bad = problems[0].number if problems else None
        for number, record in records:
            if first_bad is not None and first_bad < number:
                break
            try:
                chats = encode_record(record, template, recipe)
            except BadSample as error:
                raise DataError(
                    str(RecordProblem(block.path, block.form, number, str(error)))
                ) from None
            for encoded in chats:
                yield f"{block.path}, {block.form} {number}", encoded
        if problems:
            raise DataError(str(problems[0]))
