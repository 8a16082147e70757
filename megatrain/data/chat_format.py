"""Records to conversations: three forms that data for finetuning come in, checked and brought to one.

| fields of the record                          | becomes                                                              |
|-----------------------------------------------|----------------------------------------------------------------------|
| `messages`, and `tools` or none               | itself                                                               |
| `prompt`, `completion`                        | a user's and an assistant's turn; or messages before and to be learnt |
| `instruction`, `input` or none, `output`      | a user's turn, instruction over input, and an assistant's            |

The two short forms may have a `system` field. Turns come in this order, as templates expect them:

    [system]  user  assistant  user  assistant ...        an assistant's turn with tool_calls is followed by tools'
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

Message = dict[str, Any]

_FORMS = "messages; prompt and completion; instruction and output"
_BEFORE = {
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool"),
}
"""Each role, and what may stand before it; `call` is an assistant's turn with tool calls."""


class BadSample(Exception):
    """A record that cannot be learnt from; the reason is worded without its place, which the caller adds."""


class Conversation(NamedTuple):
    """Checked messages that end with an assistant's turn, and the tools offered in them as JSON schemas."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def read_conversation(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation in a record; raises BadSample."""
    given = {name for name, value in record.items() if value is not None}
    if "messages" in given:
        messages = _messages(record["messages"], "messages")
    elif {"prompt", "completion"} <= given:
        messages = _side(record, "prompt", "user") + _side(record, "completion", "assistant")
    elif {"instruction", "output"} <= given:
        question = [_text(record, name) for name in ("instruction", "input") if record.get(name)]
        messages = [
            *_system(record),
            {"role": "user", "content": "\n\n".join(question)},
            {"role": "assistant", "content": _text(record, "output")},
        ]
    else:
        raise BadSample(
            f"missing fields: it has {', '.join(record) or 'none'}, and one of these is needed: {_FORMS}"
        )
    check_order(messages)
    return Conversation(messages, _tools(record.get("tools")))


def check_order(messages: list[Message]) -> None:
    """Refuse turns that are out of order or empty."""
    before = "start"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if before not in _BEFORE[role]:
            raise BadSample(
                f"roles out of order: message {number} is the {role}'s, {_after(before)}"
            )
        before = "call" if message.get("tool_calls") else role
        if (
            role == "assistant"
            and not message.get("tool_calls")
            and not str(message.get("content") or "").strip()
        ):
            raise BadSample(f"message {number} is an empty assistant turn")
    if before not in ("assistant", "call"):
        raise BadSample(
            f"roles out of order: the last message is the {before}'s and not the assistant's"
        )


def _after(before: str) -> str:
    return {"start": "at the start", "call": "after an assistant's with tool calls"}.get(
        before, f"after the {before}'s"
    )


def _side(record: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """One side of a prompt and its completion: text, or messages."""
    if isinstance(record[name], list):
        return _messages(record[name], name)
    return [
        *(_system(record) if role == "user" else []),
        {"role": role, "content": _text(record, name)},
    ]


def _system(record: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []


def _text(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise BadSample(f'field "{name}" is not text')
    return str(record[name])


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadSample(f'field "{name}" is not a list of messages')
    return [_message(message, number) for number, message in enumerate(value, start=1)]


def _message(value: Any, number: int) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise BadSample(f"message {number} has no role")
    message = {
        key: item for key, item in value.items() if item is not None
    }  # parquet fills what others have with null
    if message["role"] not in _BEFORE:
        raise BadSample(
            f"message {number} has the unknown role {message['role'][:40]!r}; known are {', '.join(_BEFORE)}"
        )
    if calls := message.pop("tool_calls", None):
        if message["role"] != "assistant":
            raise BadSample(f"message {number} is the {message['role']}'s and has tool calls")
        message["tool_calls"] = [
            _call(call, number) for call in _list(calls, f"tool calls of message {number}")
        ]
    if not isinstance(message.setdefault("content", ""), str):
        raise BadSample(f"the content of message {number} is not text")
    return message


def _call(value: Any, number: int) -> dict[str, Any]:
    """A tool call with its arguments as a mapping, as templates want them; APIs write them as JSON in a string."""
    call = _without_nulls(value) if isinstance(value, dict) else {}
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadSample(f"a tool call of message {number} names no function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise BadSample(
                f"a tool call of message {number} has arguments that are not valid JSON"
            ) from None
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadSample(f"{what} are not valid JSON") from None
    if not isinstance(value, list):
        raise BadSample(f"{what} are not a list")
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if not value:
        return None
    tools = _list(value, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadSample("tools are not JSON schemas")
    return tools
