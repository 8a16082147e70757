"""Conversations from records of three formats, and the reason why a record is not valid."""

from __future__ import annotations

import pytest

from megatrain.data.chat_format import BadSample, read_conversation

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM, TOOL = {"role": "system", "content": "Be kind"}, {"role": "tool", "content": "2"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}

FORMS = {
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "nulls, as parquet has them": (
        {
            "messages": [
                {**USER, "tool_calls": None},
                {**ANSWER, "tool_calls": None, "name": None},
            ],
            "prompt": None,
            "tools": None,
        },
        [USER, ANSWER],
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, [USER, ANSWER]),
    "prompt and completion of messages": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        [SYSTEM, USER, ANSWER],
    ),
    "prompt and completion under a system": (
        {"system": "Be kind", "prompt": "Hi", "completion": "Hello"},
        [SYSTEM, USER, ANSWER],
    ),
    "instruction": ({"instruction": "Hi", "input": "", "output": "Hello"}, [USER, ANSWER]),
    "instruction and input": (
        {"instruction": "Add", "input": "1 1", "output": "Hello"},
        [{"role": "user", "content": "Add\n\n1 1"}, ANSWER],
    ),
    "tools": (
        {"messages": [USER, CALL, TOOL, TOOL, ANSWER]},
        [USER, {**CALL, "content": ""}, TOOL, TOOL, ANSWER],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_formats(form):
    record, messages = FORMS[form]
    assert read_conversation(record).messages == messages


def test_arguments_of_calls_and_tools_may_be_json_in_a_string():
    call = {
        "role": "assistant",
        "tool_calls": [
            {"function": {"name": "f", "arguments": '{"a": 1}', "id": None}, "id": None}
        ],
    }
    read = read_conversation({"messages": [USER, call], "tools": '[{"name": "f"}]'})
    assert read.messages[1] == {**CALL, "content": ""}
    assert read.tools == [{"name": "f"}]


BAD = {
    "roles out of order: message 1 is the assistant's, at the start": {"messages": [ANSWER]},
    "roles out of order: message 2 is the user's, after the user's": {
        "messages": [USER, USER, ANSWER]
    },
    "roles out of order: message 3 is the assistant's, after the assistant's": {
        "messages": [USER, ANSWER, ANSWER]
    },
    "roles out of order: message 2 is the system's, after the user's": {
        "messages": [USER, SYSTEM, ANSWER]
    },
    "roles out of order: message 2 is the tool's, after the user's": {
        "messages": [USER, TOOL, ANSWER]
    },
    "roles out of order: message 3 is the user's, after an assistant's with tool calls": {
        "messages": [USER, CALL, USER, ANSWER]
    },
    "roles out of order: the last message is the user's and not the assistant's": {
        "messages": [USER, ANSWER, USER]
    },
    "message 2 is an empty assistant turn": {
        "messages": [USER, {"role": "assistant", "content": " \n"}]
    },
    "message 2 is an empty assistant turn ": {"prompt": "Hi", "completion": ""},
    "message 2: role 'bot' is not supported (supported: system, user, assistant, tool)": {
        "messages": [USER, {"role": "bot", "content": "x"}]
    },
    "message 1 has no role": {"messages": ["Hi"]},
    "the content of message 1 is not text": {
        "messages": [{"role": "user", "content": [1]}, ANSWER]
    },
    'field "messages" is not a list of messages': {"messages": []},
    'field "completion" is not text': {"prompt": "Hi", "completion": 3},
    "a tool call of message 2 has no function name": {
        "messages": [USER, {"role": "assistant", "tool_calls": [{}]}]
    },
    "a tool call of message 2 has arguments that are not valid JSON": {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        ]
    },
    "message 1 is the user's and has tool calls": {
        "messages": [{**USER, "tool_calls": CALL["tool_calls"]}, ANSWER]
    },
    "tools are not JSON schemas": {"messages": [USER, ANSWER], "tools": ["f"]},
    "missing fields: it has text, prompt; required: "
    "messages; prompt and completion; instruction and output": {
        "text": "x",
        "prompt": "y",
    },
}


@pytest.mark.parametrize("reason", BAD)
def test_invalid_record_is_refused_with_its_reason(reason):
    with pytest.raises(BadSample) as error:
        read_conversation(BAD[reason])
    assert str(error.value) == reason.strip()
