"""Tokens attend within their document and their window, and never to later tokens."""

import pytest
import torch
from helpers.networks import GPT2, LLAMA, build, logits, loss, make_microbatch, scramble, tokens

from megatrain.models.config import load_hf_config, read_config

MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 4}
MODELS = pytest.mark.parametrize(
    "model",
    [
        LLAMA,
        GPT2,
        MISTRAL,
        {**LLAMA, "attention_dropout": 0.0, "model_type": "qwen3", "head_dim": 8},
    ],
    ids=["llama", "gpt2", "mistral", "qwen3"],
)
FIRST = 7


def made(model):
    layers = build(model)
    scramble(layers)
    return layers.eval(), read_config(load_hf_config(model))


@MODELS
@torch.no_grad()
def test_packed_documents_equal_separate_documents(model):
    """Logits, and the losses of the tokens inside each."""
    layers, architecture = made(model)
    given = tokens()
    documents = (torch.arange(16) >= FIRST).long().expand_as(given)
    positions = torch.cat([torch.arange(FIRST), torch.arange(16 - FIRST)]).expand_as(given)
    labels = given.roll(-1, 1)
    labels[:, [FIRST - 1, -1]] = -100
    both = make_microbatch(architecture, given, labels, positions=positions, documents=documents)
    parts = [
        make_microbatch(architecture, given[:, part], labels[:, part])
        for part in (slice(0, FIRST), slice(FIRST, 16))
    ]
    torch.testing.assert_close(
        logits(layers, both),
        torch.cat([logits(layers, part) for part in parts], dim=1),
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(
        loss(layers, both), sum(loss(layers, part) for part in parts), rtol=1e-5, atol=0
    )
    across = make_microbatch(architecture, given, labels)
    assert not torch.allclose(
        logits(layers, across)[:, FIRST:], logits(layers, both)[:, FIRST:], atol=1e-2
    )


@MODELS
@torch.no_grad()
def test_tokens_do_not_attend_to_later_tokens(model):
    layers, architecture = made(model)
    given = tokens()
    changed = given.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 67
    before, after = (logits(layers, make_microbatch(architecture, x)) for x in (given, changed))
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)


@torch.no_grad()
def test_receptive_field_of_a_window_grows_with_the_layers():
    """4 tokens, itself included, in each of 2 layers: 6 tokens back and no further."""
    layers, architecture = made(MISTRAL)
    given = tokens()
    changed = given.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 67
    moved = (
        logits(layers, make_microbatch(architecture, given))
        - logits(layers, make_microbatch(architecture, changed))
    ).abs().amax((0, 2)) > 1e-5
    assert moved.tolist() == [5 <= place <= 11 for place in range(16)]


def drawn(mask):
    return ["".join("x" if cell else "." for cell in row) for row in mask]


def test_masks_equal_the_drawings():
    given = make_microbatch(
        read_config(load_hf_config(GPT2)),
        tokens(rows=1, length=6),
        documents=torch.tensor([[0, 0, 0, 1, 1, 1]]),
    )
    assert drawn(given.mask(None)[0, 0]) == [
        "x.....",
        "xx....",
        "xxx...",
        "...x..",
        "...xx.",
        "...xxx",
    ]
    assert drawn(given.mask(2)[0, 0]) == [
        "x.....",
        "xx....",
        ".xx...",
        "...x..",
        "...xx.",
        "....xx",
    ]
    plain = make_microbatch(read_config(load_hf_config(GPT2)), tokens(rows=1, length=6))
    assert drawn(plain.mask(3)[0, 0]) == [
        "x.....",
        "xx....",
        "xxx...",
        ".xxx..",
        "..xxx.",
        "...xxx",
    ]
    assert plain.mask(None) is plain.mask(6) is None
