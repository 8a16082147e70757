"""Conversations from records in three formats of finetuning data.

| fields of the record                      | conversation                                 |
|-------------------------------------------|----------------------------------------------|
| `messages`, optional `tools`              | the messages                                 |
| `prompt`, `completion`                    | a user and an assistant turn; or messages    |
| `instruction`, optional `input`, `output` | a user turn (both joined), an assistant turn |

The last two may have a `system` field. Turns must have the order that templates expect:

    [system]  user  assistant  user  assistant ...    `tool` turns follow one with tool_calls
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

Message = dict[str, Any]

_FORMATS = "messages; prompt and completion; instruction and output"
_PREDECESSORS = {
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool"),
}
"""The roles that may come before each role; `call` is an assistant turn with tool calls."""


class BadSample(Exception):
    """A record that cannot be trained on. The caller adds file and line to the reason."""


class Conversation(NamedTuple):
    """Valid messages that end with an assistant turn, and the tools offered as JSON schemas."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def read_conversation(record: Mapping[str, Any]) -> Conversation:
    """Returns the conversation in a record; raises BadSample if it is not valid."""
    present = {name for name, value in record.items() if value is not None}
    if "messages" in present:
        messages = _messages(record["messages"], "messages")
    elif {"prompt", "completion"} <= present:
        messages = _side(record, "prompt", "user") + _side(record, "completion", "assistant")
    elif {"instruction", "output"} <= present:
        question = [_text(record, name) for name in ("instruction", "input") if record.get(name)]
        messages = [
            *_system(record),
            {"role": "user", "content": "\n\n".join(question)},
            {"role": "assistant", "content": _text(record, "output")},
        ]
    else:
        raise BadSample(
            f"missing fields: it has {', '.join(record) or 'none'}; required: {_FORMATS}"
        )
    check_order(messages)
    return Conversation(messages, _tools(record.get("tools")))


def check_order(messages: list[Message]) -> None:
    """Raises BadSample if turns are out of order or empty."""
    previous = "start"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if previous not in _PREDECESSORS[role]:
            raise BadSample(
                f"roles out of order: message {number} is the {role}'s, {_location(previous)}"
            )
        previous = "call" if message.get("tool_calls") else role
        if (
            role == "assistant"
            and not message.get("tool_calls")
            and not str(message.get("content") or "").strip()
        ):
            raise BadSample(f"message {number} is an empty assistant turn")
    if previous not in ("assistant", "call"):
        raise BadSample(
            f"roles out of order: the last message is the {previous}'s and not the assistant's"
        )


def _location(previous: str) -> str:
    special = {"start": "at the start", "call": "after an assistant's with tool calls"}
    return special.get(previous, f"after the {previous}'s")


def _side(record: Mapping[str, Any], name: str, role: str) -> list[Message]:
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
    # In parquet, fields that only other messages have are null.
    message = {key: item for key, item in value.items() if item is not None}
    if message["role"] not in _PREDECESSORS:
        raise BadSample(
            f"message {number}: role {message['role'][:40]!r} is not supported "
            f"(supported: {', '.join(_PREDECESSORS)})"
        )
    if calls := message.pop("tool_calls", None):
        if message["role"] != "assistant":
            raise BadSample(f"message {number} is the {message['role']}'s and has tool calls")
        message["tool_calls"] = [
            _tool_call(call, number) for call in _list(calls, f"tool calls of message {number}")
        ]
    if not isinstance(message.setdefault("content", ""), str):
        raise BadSample(f"the content of message {number} is not text")
    return message


def _tool_call(value: Any, number: int) -> dict[str, Any]:
    """Returns a tool call with its arguments as a mapping; APIs write them as JSON in a string."""
    call = _without_nulls(value) if isinstance(value, dict) else {}
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadSample(f"a tool call of message {number} has no function name")
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


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadSample(f"{name} are not valid JSON") from None
    if not isinstance(value, list):
        raise BadSample(f"{name} are not a list")
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if not value:
        return None
    tools = _list(value, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadSample("tools are not JSON schemas")
    return tools
