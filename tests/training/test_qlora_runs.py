"""A base model in 4 bits on each layout equals peft on transformers with bitsandbytes."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from helpers.adapter_runs import train_and_resume
from helpers.lora_runs import (
    MODELS,
    PP,
    TP,
    TP_PP,
    in_4_bits,
    layout,
    make_config,
    reference,
    row,
    run_layout,
    tokens,
)
from helpers.rank_pool import run_ranks
from helpers.reference_model import assert_equal
from helpers.training_runs import microbatches
from safetensors.torch import load_file

from megatrain.distributed.mesh import make_mesh
from megatrain.errors import ConfigError
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.quantize import check_bitsandbytes, check_blocks, quantized_bytes

pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install 'megatrain[qlora]'"
)

NF4 = {"lora.quantize": "nf4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns the folder of each reference's model."""
    root = tmp_path_factory.mktemp("base")
    return lambda model, kind: root / f"{model}-{kind}"


ROWS = [
    row("wide"),
    row("wide", "dora", 2, **TP),
    row("wide", "lora", 2, schedule="zb-v", **PP),
    row("wide", "dora", 4, sequence=True, **TP_PP),
    row("wide-gpt2", "lora", 2, **TP),
    row("wide-gpt2", "lora", 2, zero=3),
    row("wide", "lora", 2, zero=0, recompute="full"),
    row("wide-gpt2", "lora", 8, schedule="zb-h1", **TP_PP),
]


@pytest.mark.parametrize(("model", "kind", "world", "settings"), ROWS)
def test_equals_peft_with_bitsandbytes(model, kind, world, settings, base, tmp_path):
    results = run_ranks(run_layout, world, layout(model, kind, settings, **NF4), folder=tmp_path)
    assert_equal(results, reference(model, kind, quantized_in=base(model, kind)), losses=2e-6)


def test_bf16_is_close_to_fp32(base, tmp_path):
    """Codes are computed from the original weights, and become bf16 when they are multiplied."""
    results = run_ranks(
        run_layout, 2, layout("wide", "lora", TP, **NF4, **{"train.dtype": "bf16"}), folder=tmp_path
    )
    assert_equal(
        results,
        reference("wide", "lora", quantized_in=base("wide", "lora")),
        losses=1e-3,
        norms=3e-2,
        gradient=0.1,
    )


def evaluate_folder(rank, world_size, config, folder):
    """Returns the loss, bytes and weights of the linears, and temporary tensors that still live."""
    from megatrain.checkpoint.init_from_hf import Pretrained
    from megatrain.training import step_runner as training

    p, made, quantize = config.parallel, [], training.quantize_linears

    def watched(stage, *, device, fill):
        def noted(spec, parameter):
            made.append((weakref.ref(parameter), parameter.numel()))
            fill(spec, parameter)

        quantize(stage, device=device, fill=noted)

    training.quantize_linears = watched
    try:
        mesh = make_mesh(
            rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size)
        )
        architecture = read_config(load_hf_config(config.model))
        runner = training.StepRunner(
            config,
            architecture,
            mesh,
            torch.device("cpu"),
            pretrained=Pretrained(folder, architecture),
        )
    finally:
        training.quantize_linears = quantize
    gc.collect()
    alive = sum(parameter() is not None for parameter, _ in made)
    return (
        runner.evaluate(batches_of, 1).loss,
        quantized_bytes(runner.stage),
        sum(count for _, count in made),
        alive,
    )


def batches_of(number):
    return microbatches(tokens(1), 2, make_mesh(0, connect=False).data)


@pytest.mark.parametrize(("model", "dtype"), [("wide", "fp32"), ("wide-gpt2", "bf16")])
def test_folder_is_loaded_in_4_bits_without_further_memory(model, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = in_4_bits(
        AutoModelForCausalLM.from_config(
            load_hf_config({**MODELS[model], "initializer_range": 0.2})
        ),
        tmp_path / "base",
    )
    batch = tokens(1)
    logits = network.train()(
        input_ids=batch[:, :-1]
    ).logits  # bitsandbytes' forward for inference on CPUs multiplies in bf16
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, 1:].flatten()
    ).detach()
    results = run_ranks(
        evaluate_folder,
        4,
        layout(model, "lora", TP_PP, **NF4, **{"train.dtype": dtype}),
        tmp_path / "base",
        folder=tmp_path,
    )
    assert [loss for loss, *_ in results] == [
        pytest.approx(float(expected), rel=2e-6 if dtype == "fp32" else 5e-3)
    ] * 4
    for _, held, weights, alive in results:
        assert held == weights * 4.5 / 8
        assert alive == 0, "matrices that were quantized"
    whole = sum(
        p.numel()
        for name, p in AutoModelForCausalLM.from_pretrained(tmp_path / "base").named_parameters()
        if is_linear(name, p)
    )
    assert sum(weights for _, _, weights, _ in results) == whole


def is_linear(name, parameter):
    return parameter.dim() == 2 and not any(
        word in name for word in ("embed", "wte", "wpe", "lm_head")
    )


@pytest.mark.parametrize(
    ("changes", "tensor", "words"),
    [
        (
            {},
            4,
            r"lora.quantize=nf4 requires rows of complete blocks of 64 values .* parallel.tensor=4 "
            r".*\(hidden_size=64, heads x head_dim=128, intermediate_size=128\) is not; "
            r"parallel.tensor=1 or 2 also works",
        ),
        ({"hidden_size": 96}, 1, "hidden_size=96, "),
    ],
)
def test_rows_that_are_not_multiples_of_a_block(changes, tensor, words):
    config = make_config("wide", {"quantize": "nf4"})
    architecture = read_config(load_hf_config({**MODELS["wide"], **changes}))
    check_blocks(read_config(load_hf_config(MODELS["wide"])), config.lora, 2)
    check_blocks(architecture, replace(config.lora, quantize="none"), tensor)
    with pytest.raises(ConfigError, match=words):
        check_blocks(architecture, config.lora, tensor)


@pytest.mark.parametrize("there", [None, "0.49.9"])
def test_without_bitsandbytes(there, monkeypatch):
    def version(name):
        if there is None:
            raise metadata.PackageNotFoundError(name)
        return there

    config = make_config("wide", {"quantize": "nf4"})
    check_bitsandbytes(config.lora)
    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(
        ConfigError,
        match=rf"needs bitsandbytes 0.50 or newer; installed: {there or 'none'}; "
        r".*'megatrain\[qlora\]'",
    ):
        check_bitsandbytes(config.lora)
    check_bitsandbytes(replace(config.lora, quantize="none"))


def test_resumed_run_is_bit_identical(tmp_path):
    """The base is quantized again, to the same codes; only adapters are saved."""
    settings = {"train.steps": 4, "train.global_batch_size": 4, "train.micro_batch_size": 1}
    config = layout("wide", "lora", TP, **NF4, **settings)
    losses, again, _ = run_ranks(
        train_and_resume, 2, config, tmp_path / "checkpoints", folder=tmp_path
    )[0]
    assert again == losses
    names = load_file(tmp_path / "checkpoints" / "step-00000004" / "adapter_model.safetensors")
    assert all("lora_" in name for name in names)
