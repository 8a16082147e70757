"""Predicted memory against real ranks: states to the byte, the peak of a step within bounds."""

from __future__ import annotations

import gc
from unittest.mock import patch

import pytest
import torch
from helpers.layout_runs import MODELS
from helpers.rank_pool import run_ranks
from torch._subclasses.fake_tensor import FakeTensor

from megatrain.config import loader as configuration
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.models.config import load_hf_config, read_config
from megatrain.pipeline.schedules import SCHEDULES, build_schedule
from megatrain.planner.activation_memory import ActivationFootprint, is_fused
from megatrain.planner.memory import peak_of, predict
from megatrain.planner.run_spec import Cluster, RunSpec
from megatrain.planner.tensor_tracker import TensorTracker

LENGTH, MICRO, BUCKET = 64, 2, 20_000
"""A length at which activations outweigh the rest, and buckets smaller than the weights."""


def settings(model, *, dtype="fp32", recompute="none", sequences=8, name="adamw", **parallel):
    return {
        "model": {**MODELS[model], "num_hidden_layers": 5},
        "parallel": parallel,
        "data": {"sequence_length": LENGTH},
        "optimizer": {"name": name},
        "train": {
            "steps": 3,
            "global_batch_size": sequences,
            "micro_batch_size": MICRO,
            "dtype": dtype,
            "recompute": recompute,
        },
    }


def make_spec(config, world_size=1, *, device="cpu"):
    model = read_config(load_hf_config(config.model))
    return RunSpec.create(config, model, Cluster(1, world_size, device))


def small_buckets():
    """Makes the buckets of ZeRO small relative to the weights, as they are for real models."""
    return patch("megatrain.optim.zero_engine.BUCKET", BUCKET)


def storages():
    """Returns all storages of this process by address; references keep addresses unique."""
    gc.collect()
    # torch.compile leaves fake tensors, which have no memory.
    tensors = [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, torch.Tensor)
        and not isinstance(thing, FakeTensor)
        and thing.device.type == "cpu"
    ]
    return {
        storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)
    }


def batches(config, count, seed):
    tokens = torch.randint(
        0, 67, (count * MICRO, LENGTH + 1), generator=torch.Generator().manual_seed(seed)
    )
    position = torch.arange(LENGTH).expand(MICRO, LENGTH)
    return [
        Batch(
            rows[:, :-1].contiguous(),
            rows[:, 1:].contiguous(),
            position.clone(),
            torch.zeros_like(position),
        )
        for rows in tokens.split(MICRO)
    ]


def real_memory(rank, world_size, rows):
    """Returns pipeline rank, bytes of states and peak bytes of steps for each row's run."""
    from megatrain.training.step_runner import StepRunner

    found = []
    with small_buckets():
        for raw in rows:
            config = configuration.from_dict(raw)
            p = config.parallel
            before = storages()
            mesh = make_mesh(
                rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size)
            )
            runner = StepRunner(
                config, read_config(load_hf_config(config.model)), mesh, torch.device("cpu")
            )
            stays = sum(
                storage.nbytes() for address, storage in storages().items() if address not in before
            )
            added = 0
            for step in range(
                1, 3 if p.zero == 3 else 2
            ):  # ZeRO 3 gathers ahead once it has seen a step
                with TensorTracker() as live:
                    runner.train_step(
                        step, batches(config, config.microbatches(mesh.data.size), step)
                    )
                added = max(added, live.peak)
            found.append((mesh.pipeline.rank, stays, added))
            del runner, before
    return found


def check_rows(rows, world_size, folder, *, low, high, exact=True):
    results = run_ranks(real_memory, world_size, rows, folder=folder)
    for number, raw in enumerate(rows):
        config = configuration.from_dict(raw)
        with small_buckets():
            predicted = predict(make_spec(config, world_size))
        for of_rank in results:
            pipeline_rank, stays, added = of_rank[number]
            memory = predicted[pipeline_rank]
            where = (raw["parallel"], raw["train"]["dtype"], pipeline_rank)
            if exact:
                assert memory.states == stays, where
            assert low <= memory.total / (stays + added) <= high, (*where, memory, stays, added)


def test_zero_0_and_1_with_offload_and_optimizers(tmp_path):
    rows = [
        settings("llama", zero=0),
        settings("llama", zero=1, dtype="bf16"),
        settings("gpt2", zero=0, dtype="bf16"),
        settings("qwen3", zero=1, name="lion"),
        settings("tied", zero=1, name="sgd"),
        settings("llama", tensor=2, sequence=True),
        settings("phi3", tensor=2, recompute="full"),
        settings("gemma2", tensor=2, recompute="selective"),
    ]
    check_rows(rows, 2, tmp_path, low=0.99, high=1.05)
    check_rows(
        [settings("llama", offload="cpu"), settings("llama", offload="cpu", dtype="bf16")],
        2,
        tmp_path,
        low=0.95,
        high=1.06,
        exact=False,
    )


def test_zero_2_and_3(tmp_path):
    """Estimates, because buckets fill and weights are prefetched at times of DeepSpeed's choice."""
    rows = [
        settings("llama", zero=zero, dtype=dtype) for zero in (2, 3) for dtype in ("fp32", "bf16")
    ]
    check_rows(rows, 2, tmp_path, low=0.95, high=1.15, exact=False)


def test_schedules(tmp_path):
    """Ranks hold the microbatches of their schedule, received messages and pending sends."""
    names = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipev")
    rows = [settings("llama", sequences=16, pipeline=2, schedule=name) for name in names]
    rows += [
        settings("gpt2", pipeline=2, recompute="full", schedule="zb-v"),
        settings("mistral", pipeline=2),
        settings("tied", pipeline=2, dtype="bf16"),
    ]
    check_rows(rows, 2, tmp_path, low=0.99, high=1.08)


def test_three_axes(tmp_path):
    odd = settings("tied", pipeline=2)  # whose optimizer has a few elements more than the model
    odd["model"] |= {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    rows = [
        settings("tied", tensor=2, pipeline=2, sequence=True, dtype="bf16"),
        settings("llama", pipeline=2, sequences=16),
        odd,
    ]
    check_rows(rows, 4, tmp_path, low=0.97, high=1.08)


def test_adapters_and_weights_in_four_bits():
    raw = settings("llama")
    raw["model"] |= {"hidden_size": 64, "intermediate_size": 128}
    raw["train"]["init_from"] = "somewhere"

    def of(**lora):
        config = configuration.from_dict({**raw, "lora": lora})
        (memory,) = predict(make_spec(config))
        return memory

    whole, adapters, quantized = of(), of(rank=4), of(rank=4, quantize="nf4")
    trained = adapters.parameters - whole.parameters
    linears = 5 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert adapters.weights == 4 * adapters.parameters
    assert (adapters.gradients, adapters.optimizer) == (4 * trained, 12 * trained + 4)
    assert quantized.parameters == adapters.parameters
    assert adapters.weights - quantized.weights == linears * (4 - 0.5 - 4 / 64)


@pytest.mark.parametrize(
    "name", [name for name, family in SCHEDULES.items() if family.bounded_peak]
)
def test_peak_needs_two_microbatches_per_rank(name):
    chunks = [
        ActivationFootprint(100 + 7 * chunk, 140, 90, 30 + chunk, 60, 20, 0)
        for chunk in range(SCHEDULES[name].chunks)
    ]
    for ranks in (1, 2, 3, 5, 8):
        few, many = (build_schedule(name, ranks, count) for count in (2 * ranks, 9 * ranks + 1))
        for rank in range(ranks):
            assert sum(peak_of(few, rank, chunks, message_bytes=3, on_cpu=False)) == sum(
                peak_of(many, rank, chunks, message_bytes=3, on_cpu=False)
            )


@pytest.mark.parametrize("task", ["classification", "token-classification"])
def test_classifiers_and_pairs(task, tmp_path):
    """Every head is measured on the meta device, where labels have no values."""
    raw = {**settings("llama", pipeline=2), "task": "dpo"}
    config = configuration.from_dict(raw)
    pairs = predict(make_spec(config, 2, device="cuda"))
    from megatrain.models.classification_config import with_classifier

    hf = load_hf_config(config.model)
    hf.id2label, hf.pad_token_id = {number: str(number) for number in range(5)}, 0
    classifier = with_classifier(
        hf, of_tokens=task == "token-classification", dropout=0.1, label_smoothing=0.0
    )
    labels = predict(RunSpec.create(config, classifier, Cluster(1, 2, "cuda")))
    assert pairs[0].total == labels[0].total
    assert 0 < labels[1].total < pairs[1].total  # no logits of a vocabulary


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "grouped", "fused"),
    [
        ("cpu", torch.float32, True, True, True),
        ("cuda", torch.bfloat16, False, True, True),
        ("cuda", torch.bfloat16, True, True, False),
        ("cuda", torch.bfloat16, True, False, True),
        ("cuda", torch.float32, False, True, False),
        ("cuda", torch.float32, False, False, True),
    ],
)
def test_fused_attention_by_device_and_mask(device, dtype, masked, grouped, fused):
    assert is_fused(device, dtype=dtype, head_dim=64, masked=masked, grouped=grouped) is fused


def test_tracker_counts_live_storages_once():
    with TensorTracker() as live:
        a = torch.zeros(10)
        b = a.view(2, 5)
        c = a + 1
        assert live.bytes == 80
        del a, c
        assert live.bytes == 40
        b.add_(1)
        assert (live.bytes, live.peak) == (40, 80)
        live.reset_peak()
        assert live.peak == 40
    meta = torch.empty(3, device="meta", dtype=torch.bfloat16)
    with TensorTracker([meta]) as live:
        twice = meta.view(3).mul(2)
        assert live.bytes == twice.nbytes == 6
