"""Loss masks under the templates of six families, compared with transformers."""

from __future__ import annotations

import json

import pytest
from helpers.chat_templates import CHAT, MARKED, SPECIAL, TEMPLATES

from megatrain.data.chat_format import BadSample, Conversation, read_conversation
from megatrain.data.chat_template import ChatTemplate
from megatrain.data.tokenizer import train_tokenizer
from megatrain.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer_without_template(tmp_path_factory):
    """A tokenizer that knows every family's special tokens and has no template."""
    folder = tmp_path_factory.mktemp("chat")
    text = (
        "user assistant system model Hello you See Bye [INST] [/INST] "
        "You are a helpful assistant. tool_call "
    )
    (folder / "text.jsonl").write_text(json.dumps({"text": text * 4}))
    train_tokenizer(
        [folder / "text.jsonl"], vocab_size=340, output=folder / "made", special_tokens=SPECIAL
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "made")
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.save_pretrained(folder / "made")
    return folder / "made"


@pytest.fixture(scope="module")
def templates(tokenizer_without_template):
    """Each family's template with the tokenizer."""
    made = {}
    for name, text in TEMPLATES.items():
        file = tokenizer_without_template.parent / f"{name}.jinja"
        file.write_text(text)
        made[name] = ChatTemplate(tokenizer_without_template, file=file)
    return made


def with_marks(template, conversation, train_on):
    """Decodes the tokens and puts « and » around those with a loss."""
    tokens, loss_mask = template.encode(conversation, train_on=train_on)
    parts, before = [], False
    for token, now in zip(tokens.tolist(), loss_mask.tolist(), strict=True):
        if now != before:
            parts.append("«" if now else "»")
        parts.append(template.tokenizer.decode([token]))
        before = now
    return "".join(parts) + ("»" if before else "")


@pytest.mark.parametrize("family", TEMPLATES)
def test_loss_is_on_the_assistants_tokens(family, templates):
    assert with_marks(templates[family], Conversation(CHAT), "assistant") == MARKED[family]


@pytest.mark.parametrize("family", TEMPLATES)
def test_loss_on_the_last_turn_only(family, templates):
    first, second = MARKED[family].split("»", 1)
    assert (
        with_marks(templates[family], Conversation(CHAT), "completion")
        == first.replace("«", "") + second
    )


@pytest.mark.parametrize("family", TEMPLATES)
def test_tokens_are_those_of_transformers(family, templates):
    template = templates[family]
    for train_on in ("assistant", "completion", "all"):
        tokens, loss_mask = template.encode(Conversation(CHAT), train_on=train_on)
        assert tokens.tolist() == template.tokenizer.apply_chat_template(CHAT).input_ids
        assert loss_mask.all() == (train_on == "all")


def test_marks_give_the_mask_that_transformers_gives(templates):
    template = templates["marks"]
    theirs = template.tokenizer.apply_chat_template(
        CHAT, return_assistant_tokens_mask=True, return_dict=True
    )
    tokens, loss_mask = template.encode(Conversation(CHAT), train_on="assistant")
    assert (tokens.tolist(), loss_mask.astype(int).tolist()) == (
        theirs["input_ids"],
        theirs["assistant_masks"],
    )


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_tool_calls_have_a_loss_and_tool_results_do_not(templates):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    record = {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "2"},
        ],
    }
    text = with_marks(templates["qwen"], read_conversation(record), "assistant")
    assert f"\n{json.dumps(TOOL)}\n</tools>" in text
    assert text.endswith(
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        '«<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«2<|im_end|>»\n"
    )


@pytest.mark.parametrize(
    ("family", "token"),
    [
        ("llama3", "<|eot_id|>"),
        ("qwen", "<|im_end|>"),
        ("mistral", "</s>"),
        ("gemma", "<end_of_turn>"),
        ("zephyr", "</s>"),
    ],
)
def test_stop_token(family, token, templates):
    assert templates[family].stop_token() == templates[family].tokenizer.convert_tokens_to_ids(
        token
    )


def test_stop_token_may_be_unknown(tokenizer_without_template, tmp_path):
    assert (
        template_of(
            tokenizer_without_template,
            tmp_path,
            "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}",
        ).stop_token()
        is None
    )
    assert (
        template_of(
            tokenizer_without_template,
            tmp_path,
            "{{ raise_exception('no system') if messages[0].role != 'system' }}",
        ).stop_token()
        is None
    )


def template_of(tokenizer_without_template, tmp_path, text):
    (tmp_path / "t.jinja").write_text(text)
    return ChatTemplate(tokenizer_without_template, file=tmp_path / "t.jinja")


@pytest.mark.parametrize("cut", [False, True])
def test_a_prompt_that_ends_in_a_space_and_tokenizers_that_cut_spaces_off(
    cut, tokenizer_without_template, tmp_path
):
    from tokenizers import processors

    text = (
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = template_of(tokenizer_without_template, tmp_path, text)
    template.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=cut)
    chat = Conversation(
        [{"role": "user", "content": "é 🙂 "}, {"role": "assistant", "content": "🙂 Zq é "}]
    )
    assert (
        with_marks(template, chat, "assistant").replace("\ufffd", "")
        == "user:   </s>assistant: « Zq  </s>»"
    )
    tokens, loss_mask = template.encode(chat, train_on="assistant")
    assert template.tokenizer.decode(tokens[loss_mask]) == "🙂 Zq é </s>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer_without_template, tmp_path):
    """Some templates drop the model's reasoning in all turns but the last."""
    text = TEMPLATES["chatml"].replace(
        "message['content'] +", "('' if loop.last else '(old) ') + message['content'] +"
    )
    template = template_of(tokenizer_without_template, tmp_path, text)
    with pytest.raises(
        BadSample,
        match=r"rewrites message 2 or an earlier one .*; train on the last turn only",
    ):
        template.encode(Conversation(CHAT), train_on="assistant")
    short = Conversation(CHAT[:2])
    with pytest.raises(
        BadSample, match=r"rewrites message 2 .*; set a template with \{% generation %\} marks"
    ):
        template.encode(short, train_on="assistant")


def test_empty_marks_leave_no_loss(tokenizer_without_template, tmp_path):
    template = template_of(
        tokenizer_without_template,
        tmp_path,
        TEMPLATES["marks"].replace("== 'assistant'", "== 'nobody'"),
    )
    with pytest.raises(BadSample, match="no token has a loss"):
        template.encode(Conversation(CHAT), train_on="assistant")


@pytest.mark.parametrize(
    ("family", "roles", "reason"),
    [
        (
            "gemma",
            ["system", "user", "assistant"],
            "the chat template fails: System role not supported",
        ),
        (
            "mistral",
            ["system", "user", "assistant"],
            "the chat template fails: Conversation roles must alternate user/assistant",
        ),
    ],
)
def test_failing_template_reports_the_reason(family, roles, reason, templates):
    with pytest.raises(BadSample, match=reason):
        templates[family].encode(
            Conversation([{"role": role, "content": "x"} for role in roles]), train_on="assistant"
        )


def test_broken_templates(tokenizer_without_template, tmp_path):
    with pytest.raises(BadSample, match="the chat template fails: Expected an expression"):
        template_of(tokenizer_without_template, tmp_path, "{% for %}").encode(
            Conversation(CHAT), train_on="assistant"
        )
    with pytest.raises(ConfigError, match=r"has no chat template; set data\.chat_template=FILE"):
        ChatTemplate(tokenizer_without_template)
    with pytest.raises(ConfigError, match=r"data.chat_template=.*nowhere.jinja cannot be read"):
        ChatTemplate(tokenizer_without_template, file=tmp_path / "nowhere.jinja")
