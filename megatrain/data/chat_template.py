"""Conversations to tokens, and which of them are the assistant's: a chat template and its tokenizer.

A template with `{% generation %}` marks says itself what the assistant writes. Without them the parts are found by
rendering prefixes: what stands between a prompt and the conversation up to the answer is the answer,

    whole        <|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Bye<|end|><|assistant|>...
    the prompt   <|user|>Hi<|end|><|assistant|>
    with answer  <|user|>Hi<|end|><|assistant|>Hello<|end|>
    learnt                                     ^^^^^^^^^^^^

and a template for which one is no prefix of the next, because it rewrites earlier turns, is refused. The whole is
tokenised at once, as generation would see it; a token is learnt if any of it lies in such a part.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatrain.data.chat_format import BadSample, Conversation, Message
from megatrain.data.tokenizer import load_tokenizer
from megatrain.errors import ConfigError

TrainOn = Literal["assistant", "completion", "all"]
Span = tuple[int, int]
Int64 = np.ndarray[Any, np.dtype[np.int64]]

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Rendered(NamedTuple):
    """A conversation as text, and the spans of characters that are learnt."""

    text: str
    spans: list[Span]


class Encoded(NamedTuple):
    """A conversation as tokens: int64[T] and bool[T]."""

    tokens: Int64
    trained: np.ndarray[Any, np.dtype[np.bool_]]


class ChatTemplate:
    """A tokenizer with its chat template, the tokenizer's own or that of a file."""

    def __init__(self, tokenizer: str | Path, *, file: str | Path | None = None) -> None:
        """Load both; raises ConfigError for a tokenizer without a template, and where there is none."""
        self.tokenizer = load_tokenizer(tokenizer)
        if file is not None:
            self.tokenizer.chat_template = _read(file)
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "data.tokenizer",
                tokenizer,
                "has no chat template",
                "give one as data.chat_template=FILE",
            )
        self._encoder = self.tokenizer.backend_tokenizer
        self._encoder.no_truncation()
        self._encoder.no_padding()
        added = {
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        self._special = tuple(sorted(added | set(self.tokenizer.all_special_tokens)))

    def encode(self, conversation: Conversation, *, train_on: TrainOn) -> Encoded:
        """Return tokens and which of them are learnt; raises BadSample when none is."""
        rendered = self.render(conversation, train_on=train_on)
        encoding = self._encoder.encode(rendered.text, add_special_tokens=False)
        tokens = np.array(encoding.ids, dtype=np.int64)
        first, last = _characters(encoding.offsets)
        trained = np.zeros(len(tokens), dtype=np.bool_)
        for start, end in rendered.spans:
            trained |= (first < end) & (last > start)
        if not trained[1:].any():  # the first token is nothing's next
            raise BadSample("no token of it would be learnt")
        return Encoded(tokens, trained)

    def render(self, conversation: Conversation, *, train_on: TrainOn) -> Rendered:
        """Return the conversation as the template writes it, with the spans that are learnt."""
        messages, tools = conversation
        if train_on == "all":
            text = self._text(messages, tools)
            return Rendered(text, [(0, len(text))])
        if _MARK.search(self._template(tools)):
            return self._by_marks(messages, tools, train_on)
        return self._by_prefixes(messages, tools, train_on)

    def stop_token(self) -> int | None:
        """The special token with which an assistant's turn ends, None where none can be told."""
        example = Conversation(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        )
        try:
            encoded = self.encode(example, train_on="completion")
        except BadSample:  # a template that wants more than this
            return None
        last = int(encoded.tokens[encoded.trained][-1])
        token = self.tokenizer.convert_ids_to_tokens(last)
        return last if token in self._special else None

    def _by_marks(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, train_on: TrainOn
    ) -> Rendered:
        text, spans = self._render(messages, tools, marks=True)
        if train_on == "completion":
            spans = spans[len(self._render(messages[:-1], tools, marks=True)[1]) :]
        return Rendered(text, spans)

    def _by_prefixes(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, train_on: TrainOn
    ) -> Rendered:
        whole = self._text(messages, tools)
        turns = [
            number for number, message in enumerate(messages) if message["role"] == "assistant"
        ]
        spans = []
        for number in turns if train_on == "assistant" else turns[-1:]:
            prompt = self._text(messages[:number], tools, prompt=True)
            answered = (
                whole if number == len(messages) - 1 else self._text(messages[: number + 1], tools)
            )
            if not (whole.startswith(answered) and answered.startswith(prompt)):
                raise BadSample(_no_prefix(number + 1, last=number == len(messages) - 1))
            spans.append((len(prompt), self._end(answered, len(prompt))))
        return Rendered(whole, spans)

    def _end(self, text: str, start: int) -> int:
        """Where a turn ends: what the template puts between the token that ends it and the next is not the assistant's."""
        turn = text[start:].rstrip()
        return start + len(turn) if turn.endswith(self._special) else len(text)

    def _template(self, tools: list[dict[str, Any]] | None) -> str:
        try:
            return str(self.tokenizer.get_chat_template(tools=tools))
        except ValueError as error:  # several, and none is the default
            raise BadSample(_one_line(error)) from None

    def _text(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False
    ) -> str:
        return self._render(messages, tools, prompt=prompt)[0]

    def _render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        *,
        prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._template(tools)
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self.tokenizer.special_tokens_map,
            )
        except (
            Exception
        ) as error:  # whatever a template raises, its own raise_exception and Python's errors
            raise BadSample(f"the chat template fails on it: {_one_line(error)}") from None
        return texts[0], [(start, end) for start, end in (spans[0] if spans else [])]


def _characters(offsets: list[Span]) -> tuple[Int64, Int64]:
    """The first character of each token and the one after its last, each int64[T]."""
    first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # Some tokenizers cut spaces off at both ends: what is left of a space's token is a point behind it.
    before = np.concatenate([[0], np.maximum.accumulate(last)[:-1]]) if len(last) else last
    first = np.where(first == last, np.minimum(first, before), first)
    # One that stands for no character, such as the mark of a word's start, belongs to what follows.
    return first, np.maximum(last, first + 1)


def _no_prefix(number: int, *, last: bool) -> str:
    way_out = "give a template with {% generation %} marks (data.chat_template=FILE)"
    if not last:
        way_out = f"learn the last turn alone (data.train_on=completion), or {way_out}"
    return f"the chat template writes message {number} or what stands before it otherwise when more follows; {way_out}"


def _read(file: str | Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "data.chat_template", file, f"cannot be read ({_one_line(error)})"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
