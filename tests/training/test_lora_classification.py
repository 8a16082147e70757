"""Adapters below a classifier equal peft's, load in peft and merge into a classifier."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.classification_runs import (
    LABELS,
    LENGTH,
    LR,
    MODELS,
    STEPS,
    class_of,
    evaluated,
    make_files,
    mean_loss,
    read,
    run_layout,
    settings,
    step_loss,
    train,
)
from helpers.lora_runs import scramble, scrambled, trained_by_name
from helpers.rank_pool import run_ranks
from helpers.reference_model import assert_equal, give_weights, make_stage
from helpers.reference_model import train as train_plainly
from helpers.training_runs import assert_same_run, checked, metrics
from safetensors import safe_open

from megatrain.checkpoint.peft import merge_run
from megatrain.config import loader as configuration
from megatrain.data.tokenizer import load_tokenizer
from megatrain.training.task_classification import ClassificationTask

LORA = {"rank": 4, "alpha": 6.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("labelled"))


def reference(files, problem, model, lora):
    """Trains peft on transformers' class, from our initial weights."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = checked(settings(files, problem, model))
    config = replace(config, lora=replace(config.lora, **lora))
    architecture = ClassificationTask().architecture(config)
    network = class_of(problem).from_config(architecture.config, attn_implementation="eager")
    ours = give_weights(make_stage(config, architecture), network)
    network = get_peft_model(
        network,
        LoraConfig(
            task_type="TOKEN_CLS" if problem == "tokens" else "SEQ_CLS",
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            use_dora=lora.get("dora", False),
            target_modules=["c_attn", "c_proj", "c_fc"] if model == "gpt2" else "all-linear",
            exclude_modules=["score", "classifier"],
            fan_in_fan_out=model == "gpt2",
        ),
    )
    missed = set_peft_model_state_dict(
        network, {name: scrambled(name, value.shape, value) for name, value in ours.items()}
    )
    assert not missed.unexpected_keys
    trained = trained_by_name(network)
    assert set(trained) == set(ours)
    return train_plainly(
        trained, step_loss(network.base_model.model, files, problem), steps=STEPS, lr=LR
    )


ROWS = [
    ("single-label", "llama", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, LORA),
    ("single-label", "gpt2", 2, {}, LORA),
    ("tokens", "gpt2", 4, {"tensor": 2, "pipeline": 2, "schedule": "zb-v"}, LORA | {"dora": True}),
    ("tokens", "llama", 2, {"zero": 3}, LORA),
]


@pytest.mark.parametrize(("problem", "model", "world", "parallel", "lora"), ROWS, ids=str)
def test_equals_peft(problem, model, world, parallel, lora, files, tmp_path):
    raw = settings(
        files, problem, model, parallel=parallel, lora=lora, train={"init_from": str(tmp_path)}
    )  # named, and in this test not read
    assert_equal(
        run_ranks(run_layout, world, raw, scramble, folder=tmp_path),
        reference(files, problem, model, lora),
        losses=1e-5,
    )


@pytest.mark.parametrize(
    ("problem", "model", "parallel"),
    [("single-label", "llama", {"tensor": 2}), ("tokens", "gpt2", {"pipeline": 2})],
)
def test_adapter_loads_in_peft_and_merges_into_a_classifier(
    problem, model, parallel, files, tmp_path
):
    """Starts from a sharded language model, or GPT-2 without head and prefix, and resumes."""
    import peft
    from transformers import AutoConfig

    kind = class_of(problem)
    base = tmp_path / "base"
    write_base(model, base)

    def run(name, **more):
        sections = {
            "parallel": parallel,
            "lora": LORA,
            "optimizer": {"lr": 1e-2},
            "train": {"init_from": str(base), "steps": 4, **more},
            "eval": {"every": 2, "batches": 50},
        }
        return train(files, tmp_path, problem, model=model, run=name, world=4, **sections)

    run("parts", exit_after_step=2)
    parts, whole = run("parts"), run("whole")
    assert_same_run(whole, parts, step=4)
    saved, written = whole / "checkpoints" / "step-00000004", metrics(whole)[-1]
    loss_of = loss_over(files, problem)
    labels = AutoConfig.from_pretrained(saved)
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base, config=labels), saved).eval()
    assert loss_of(theirs.base_model.model) == pytest.approx(written["valid_loss"], rel=1e-5)
    auto = (
        peft.AutoPeftModelForTokenClassification
        if problem == "tokens"
        else peft.AutoPeftModelForSequenceClassification
    )
    direct = auto.from_pretrained(saved, num_labels=3, pad_token_id=labels.pad_token_id).eval()
    given = torch.arange(1, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(direct(given).logits, theirs(given).logits, rtol=0, atol=0)

    merged = merge(whole)
    network, found = kind.from_pretrained(merged, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert network.config.id2label == dict(enumerate(LABELS))
    assert loss_of(network.eval()) == pytest.approx(written["valid_loss"], rel=1e-5)
    assert not any("lm_head" in name for name in tensor_names(merged))
    assert not (merged / "generation_config.json").exists()
    measured = evaluated(merged, files / f"{problem}.jsonl", tmp_path, parallel, window=LENGTH)[
        "figures"
    ]
    assert measured["accuracy"] == pytest.approx(written["valid_accuracy"], abs=1e-6)


def write_base(model, folder):
    """Saves a language model in shards, GPT-2's without a head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**MODELS[model], "tie_word_embeddings": False})
    )
    (language_model.base_model if model == "gpt2" else language_model).save_pretrained(
        folder, max_shard_size="40KB"
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) == (model == "llama")


def merge(run):
    """Returns the folder of the base model with the run's adapters merged."""
    config = configuration.load(run / "config.yaml")
    return merge_run(
        config.run.output_dir,
        lora=config.lora,
        task=config.task,
        init_from=config.train.init_from,
        resume_from=config.checkpoint.resume,
    )


def tensor_names(folder):
    """Returns the names of all tensors in the folder's safetensors files."""
    return [
        name
        for file in folder.glob("*.safetensors")
        for name in safe_open(file, framework="pt").keys()  # noqa: SIM118
    ]


def loss_over(files, problem):
    """Returns a network's mean loss over the file."""
    records, tokenizer = read(files, problem), load_tokenizer(files / "tokenizer")

    def of(network):
        with torch.inference_mode():
            return float(mean_loss(network, tokenizer, records, problem))

    return of
