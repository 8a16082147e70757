"""Compiled kernels are the functions that they stand for, and are refused where they cannot be made."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.networks import GPT2, LLAMA, loss, make_microbatch, scramble, tokens

from megatrain.config import loader as configuration
from megatrain.distributed import tensor_parallel
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.errors import ConfigError
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.rope import rotations
from megatrain.ops import fused
from megatrain.ops.compile import compiled
from megatrain.pipeline.stage_builder import build_stage

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 8}


def gradients(
    model, dtype: torch.dtype, *, compile: bool, recompute: str
) -> dict[str, torch.Tensor]:
    config = configuration.from_dict({"train": {"recompute": recompute, "compile": compile}})
    architecture = read_config(load_hf_config(model))
    stage = build_stage(config, architecture, make_mesh(0, connect=False), "cpu").chunks[0]
    scramble(stage)
    stage.to(dtype)
    microbatch = make_microbatch(architecture, tokens())
    microbatch.rotations = rotations(microbatch.positions, architecture, dtype)
    value = loss(stage, microbatch)
    value.backward()
    return {"loss": value.detach()} | {
        declaration.name: parameter.grad.float() for declaration, parameter in parameters(stage)
    }


@needs_compiler
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_has_the_same_gradients(dtype, recompute, monkeypatch):
    """In bf16 as near to fp32 as when nothing is compiled. With norms of queries and keys; with RMSNorm that adds one and tanh-gelu gates."""
    calls = []
    for module in (fused, tensor_parallel):
        monkeypatch.setattr(
            module,
            "compiled",
            lambda function: (calls.append(function.__name__), compiled(function))[1],
        )
    gemma = {
        **LLAMA,
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
    }
    for model in (QWEN3, gemma):
        exact = gradients(model, torch.float32, compile=False, recompute=recompute)
        plain = gradients(model, dtype, compile=False, recompute=recompute)
        assert not calls
        found = gradients(model, dtype, compile=True, recompute=recompute)
        assert set(calls) == {
            "_normalise",
            "_normalise_back",
            "_gate",
            "_gate_back",
            "_turn",
            "_turn_back",
            "_cross_entropy",
        }
        calls.clear()
        for name, gradient in exact.items():
            error, usual = (
                float((those[name] - gradient).norm() / gradient.norm()) for those in (found, plain)
            )
            assert error < (1e-5 if dtype == torch.float32 else max(2 * usual, 0.04)), name


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_derivatives_of_gates(activation):
    """Of the function that is compiled, against autograd in double precision."""
    generator = torch.Generator().manual_seed(3)
    gate, up, grad = (torch.randn(4, 5, generator=generator, dtype=torch.float32) for _ in range(3))
    gate_wide, up_wide = gate.double().requires_grad_(), up.double().requires_grad_()
    (fused._act(gate_wide, activation) * up_wide).backward(grad.double())
    dgate, dup = fused._gate_back(gate, up, grad, activation)
    torch.testing.assert_close(dgate, gate_wide.grad.float())
    torch.testing.assert_close(dup, up_wide.grad.float())


def test_it_is_refused_without_a_compiler_and_where_nothing_is_compiled(monkeypatch, tmp_path):
    llama, gpt2 = (read_config(load_hf_config(model)) for model in (LLAMA, GPT2))
    with pytest.raises(
        ConfigError,
        match=r"train\.compile=true has nothing to compile in a gpt2 model on tensor ranks",
    ):
        fused.check_compile(gpt2, tensor=2, on_gpu=False)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler on CPUs.*CXX"):
        fused.check_compile(llama, tensor=2, on_gpu=False)
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setattr(fused.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs Python's headers"):
        fused.check_compile(llama, tensor=2, on_gpu=False)
    (tmp_path / "Python.h").touch()
    fused.check_compile(llama, tensor=2, on_gpu=False)
    fused.check_compile(gpt2, tensor=1, on_gpu=False)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs triton for GPUs"):
        fused.check_compile(llama, tensor=2, on_gpu=True)
