"""Compiled kernels equal the eager functions, and are refused on machines that cannot compile."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.networks import GPT2, LLAMA, loss, make_microbatch, scramble, tokens

from megatrain.config import loader as configuration
from megatrain.distributed import cross_entropy
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.errors import ConfigError
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.params import check_compile
from megatrain.models.rope import rotations
from megatrain.ops import activation, compile, norm, rope
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
        spec.name: parameter.grad.float() for spec, parameter in parameters(stage)
    }


@needs_compiler
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_has_the_same_gradients(dtype, recompute, monkeypatch):
    """Errors in bf16 are those of eager kernels.

    One model has query and key norms, the other RMSNorm with 1 + weight and tanh-GELU gates.
    """
    calls = []
    for module in (activation, norm, rope, cross_entropy):
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
            "_normalize",
            "_normalize_backward",
            "_gate",
            "_gate_backward",
            "_rotate",
            "_rotate_backward",
            "_cross_entropy",
        }
        calls.clear()
        for name, gradient in exact.items():
            error, usual = (
                float((those[name] - gradient).norm() / gradient.norm()) for those in (found, plain)
            )
            assert error < (1e-5 if dtype == torch.float32 else max(2 * usual, 0.04)), name


def test_compilation_requires_a_compiler_and_a_compilable_module(monkeypatch, tmp_path):
    llama, gpt2 = (read_config(load_hf_config(model)) for model in (LLAMA, GPT2))
    with pytest.raises(
        ConfigError,
        match=r"train\.compile=true has no effect on a gpt2 model with parallel\.tensor=2",
    ):
        check_compile(gpt2, tensor=2, on_gpu=False)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(ConfigError, match=r"requires a C\+\+ compiler on CPUs.*CXX"):
        check_compile(llama, tensor=2, on_gpu=False)
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setattr(compile.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"requires Python's headers"):
        check_compile(llama, tensor=2, on_gpu=False)
    (tmp_path / "Python.h").touch()
    check_compile(llama, tensor=2, on_gpu=False)
    check_compile(gpt2, tensor=1, on_gpu=False)
    monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="requires triton on GPUs"):
        check_compile(llama, tensor=2, on_gpu=True)
