"""Tokens and loss masks of conversations: a chat template and its tokenizer.

A template with `{% generation %}` marks declares the assistant's parts. Without them the parts are
found by rendering prefixes. The answer is the text between the prompt and the end of the answer:

    complete       <|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Bye<|end|><|assistant|>...
    prompt         <|user|>Hi<|end|><|assistant|>
    with answer    <|user|>Hi<|end|><|assistant|>Hello<|end|>
    loss on                                      ^^^^^^^^^^^^

Each text must be a prefix of the text above it. Templates that rewrite earlier turns are not
supported. The complete text is tokenized at once, as for generation. A token has a loss if one of
its characters is in such a part.
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
    """A conversation as text, and the spans of characters that have a loss."""

    text: str
    spans: list[Span]


class EncodedChat(NamedTuple):
    """A conversation as tokens int64[T] and their loss mask bool[T]."""

    tokens: Int64
    loss_mask: np.ndarray[Any, np.dtype[np.bool_]]


class ChatTemplate:
    """A tokenizer with a chat template, its own or that of a file.

    Raises:
        ConfigError: the tokenizer has no template, or the file cannot be read.
    """

    def __init__(self, tokenizer: str | Path, *, file: str | Path | None = None) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        if file is not None:
            self.tokenizer.chat_template = _read(file)
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "data.tokenizer",
                tokenizer,
                "has no chat template",
                "set data.chat_template=FILE",
            )
        self._encoder = self.tokenizer.backend_tokenizer
        self._encoder.no_truncation()
        self._encoder.no_padding()
        added = {
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        self._special = tuple(sorted(added | set(self.tokenizer.all_special_tokens)))

    def encode(self, conversation: Conversation, *, train_on: TrainOn) -> EncodedChat:
        """Returns the tokens and their loss mask.

        Raises:
            BadSample: no token has a loss, or the template fails.
        """
        rendered = self.render(conversation, train_on=train_on)
        encoding = self._encoder.encode(rendered.text, add_special_tokens=False)
        tokens = np.array(encoding.ids, dtype=np.int64)
        first, last = _character_spans(encoding.offsets)
        loss_mask = np.zeros(len(tokens), dtype=np.bool_)
        for start, end in rendered.spans:
            loss_mask |= (first < end) & (last > start)
        if not loss_mask[1:].any():  # the first token is not predicted
            raise BadSample("no token has a loss")
        return EncodedChat(tokens, loss_mask)

    def render(self, conversation: Conversation, *, train_on: TrainOn) -> Rendered:
        """Returns the conversation as the template renders it, with the spans that have a loss."""
        messages, tools = conversation
        if train_on == "all":
            text = self._text(messages, tools)
            return Rendered(text, [(0, len(text))])
        if _MARK.search(self._template(tools)):
            return self._by_marks(messages, tools, train_on)
        return self._by_prefixes(messages, tools, train_on)

    def stop_token(self) -> int | None:
        """Returns the special token that ends an assistant turn; None if it is unknown."""
        example = Conversation(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        )
        try:
            encoded = self.encode(example, train_on="completion")
        except BadSample:  # the template needs more than this example
            return None
        last = int(encoded.tokens[encoded.loss_mask][-1])
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
        complete = self._text(messages, tools)
        turns = [number for number, m in enumerate(messages) if m["role"] == "assistant"]
        spans = []
        for number in turns if train_on == "assistant" else turns[-1:]:
            prompt = self._text(messages[:number], tools, prompt=True)
            is_last = number == len(messages) - 1
            answered = complete if is_last else self._text(messages[: number + 1], tools)
            if not (complete.startswith(answered) and answered.startswith(prompt)):
                raise BadSample(_not_a_prefix(number + 1, is_last=is_last))
            spans.append((len(prompt), self._end_of_turn(answered, len(prompt))))
        return Rendered(complete, spans)

    def _end_of_turn(self, text: str, start: int) -> int:
        """Returns the end of the turn, without white space that follows its last token."""
        turn = text[start:].rstrip()
        return start + len(turn) if turn.endswith(self._special) else len(text)

    def _template(self, tools: list[dict[str, Any]] | None) -> str:
        try:
            return str(self.tokenizer.get_chat_template(tools=tools))
        except ValueError as error:  # several templates without a default
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
        except Exception as error:  # templates raise any error of Python
            raise BadSample(f"the chat template fails: {_one_line(error)}") from None
        return texts[0], [(start, end) for start, end in (spans[0] if spans else [])]


def _character_spans(offsets: list[Span]) -> tuple[Int64, Int64]:
    """Returns the first character of each token and the one after its last, each int64[T]."""
    first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # Some tokenizers strip spaces from spans: the span of a space is then empty and lies behind it.
    before = np.concatenate([[0], np.maximum.accumulate(last)[:-1]]) if len(last) else last
    first = np.where(first == last, np.minimum(first, before), first)
    # A token without characters, such as a mark before words, belongs to the next character.
    return first, np.maximum(last, first + 1)


def _not_a_prefix(number: int, *, is_last: bool) -> str:
    hint = "set a template with {% generation %} marks (data.chat_template=FILE)"
    if not is_last:
        hint = f"train on the last turn only (data.train_on=completion), or {hint}"
    return (
        f"the chat template rewrites message {number} or an earlier one when others follow; {hint}"
    )


def _read(file: str | Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "data.chat_template",
            file,
            f"cannot be read ({_one_line(error)})",
            fix={"data.chat_template": None},
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
