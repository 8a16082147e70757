"""Adapters below a classifier: losses and gradients equal peft's, its folder loads in peft, and it merges into a classifier of transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from test_classification import (
    LABELS,
    LENGTH,
    LR,
    MODELS,
    STEPS,
    evaluated,
    make_config,
    make_files,
    of_position,
    plain_loss,
    settings,
    train,
)
from test_layouts import worst_gradient
from test_lora_runs import scramble, scrambled
from test_resume import assert_same_run, metrics

from megatrain import config as configuration
from megatrain.checkpoint.merge import merge_run
from megatrain.data.loader import Loader
from megatrain.data.tokenizer import load_tokenizer
from megatrain.models.initialize import initialize
from megatrain.models.lora import add_adapters, set_magnitudes
from megatrain.parallel.grid import make_grid
from megatrain.parallel.sharding import parameters
from megatrain.train.build import build_stage
from megatrain.train.classifying import Classification

LORA = {"rank": 4, "alpha": 6.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("labelled"))


def reference(files, problem, model, lora):
    """Losses, norms and the first gradient, by peft on transformers' class; of ours only the initial weights."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = make_config(settings(files, problem, model))
    config = replace(config, lora=replace(config.lora, **lora))
    architecture = Classification().architecture(config)
    kind = AutoModelForTokenClassification if problem == "tokens" else AutoModelForSequenceClassification
    network = kind.from_config(architecture.config, attn_implementation="eager")
    grid = make_grid(0, connect=False)
    stage = build_stage(config, architecture, grid, "cpu")
    add_adapters(stage, architecture, config.lora, grid.tensor)
    initialize(stage, config.run.seed)
    set_magnitudes(stage)
    state, ours = network.state_dict(), {}
    for declaration, parameter in parameters(stage):
        whole = ours.setdefault(declaration.name, torch.empty(declaration.shape)) if parameter.requires_grad else state[declaration.name]
        declaration.put(declaration.part_of(parameter.detach()), whole)
    network.load_state_dict(state)
    network = get_peft_model(network, LoraConfig(task_type="TOKEN_CLS" if problem == "tokens" else "SEQ_CLS", r=lora["rank"], lora_alpha=lora["alpha"],
                                                 use_dora=lora.get("dora", False), target_modules=["c_attn", "c_proj", "c_fc"] if model == "gpt2" else "all-linear",
                                                 exclude_modules=["score", "classifier"], fan_in_fan_out=model == "gpt2"))  # fmt: skip
    missed = set_peft_model_state_dict(network, {name: scrambled(name, value.shape, value) for name, value in ours.items()})
    assert not missed.unexpected_keys
    trained = {_plain(name): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert set(trained) == set(ours)
    decayed, kept = ([p for p in trained.values() if (p.dim() > 1) == large] for large in (True, False))
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.95))
    tokenizer = load_tokenizer(files / "tokenizer")
    records = [json.loads(line) for line in (files / f"{problem}.jsonl").read_text().splitlines()]
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        parts = [plain_loss(network.base_model.model, tokenizer, records[of_position(position)], problem, 0.0) for position in range(8 * step, 8 * step + 8)]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)))
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, gradients


def _plain(name):
    for word in (".modules_to_save.default", ".default"):
        name = name.replace(word, "")
    return name.replace("vector.weight", "vector")


def run_layout(rank, world_size, raw):
    from megatrain.train.trainer import Trainer

    config, task = make_config(raw), Classification()
    task.check(config)
    architecture, p = task.architecture(config), config.parallel
    grid = make_grid(rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size))
    trainer = Trainer(config, architecture, grid, torch.device("cpu"))
    scramble(trainer.zero)
    loader = Loader(task.open(config, architecture, "train").samples, global_batch_size=8, micro_batch_size=2, data_rank=grid.data.rank,
                    data_size=grid.data.size)  # fmt: skip
    losses, norms, pieces = [], [], []
    for step in range(1, STEPS + 1):
        report = trainer.step(step, loader.microbatches(step - 1))
        losses.append(report.loss)
        norms.append(report.grad_norm)
        for fragment in trainer.zero.fragments() if step == 1 else []:
            pieces.append((replace(fragment.sharding, summed=()), tuple(fragment.shape), fragment.start, fragment.tensors["exp_avg"].clone() / 0.1))
    loader.close()
    return losses, norms, pieces


ROWS = [
    ("single-label", "llama", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, LORA), ("single-label", "gpt2", 2, {}, LORA),
    ("tokens", "gpt2", 4, {"tensor": 2, "pipeline": 2, "schedule": "zb-v"}, LORA | {"dora": True}), ("tokens", "llama", 2, {"zero": 3}, LORA),
]  # fmt: skip


@pytest.mark.parametrize(("problem", "model", "world", "parallel", "lora"), ROWS, ids=str)
def test_equals_peft(problem, model, world, parallel, lora, files, tmp_path):
    raw = settings(files, problem, model, parallel=parallel, lora=lora, train={"init_from": str(tmp_path)})  # named, and in this test not read
    losses, norms, gradients = reference(files, problem, model, lora)
    results = run_ranks(run_layout, world, raw, folder=tmp_path)
    for ours, our_norms, _ in results:
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(our_norms), torch.tensor(norms), rtol=1e-5, atol=0)
    assert worst_gradient(results, gradients) < 1e-5


@pytest.mark.parametrize(("problem", "model", "parallel"), [("single-label", "llama", {"tensor": 2}), ("tokens", "gpt2", {"pipeline": 2})])
def test_a_run_is_peft_s_and_merges_into_a_classifier(problem, model, parallel, files, tmp_path):
    """From a language model in many files, or GPT-2 as its own folder has it, without head and prefix; resumed bit for bit; the figures are those of the run."""
    import peft
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    kind = AutoModelForTokenClassification if problem == "tokens" else AutoModelForSequenceClassification
    base = tmp_path / "base"
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**MODELS[model], "tie_word_embeddings": False}))
    (language_model.base_model if model == "gpt2" else language_model).save_pretrained(base, max_shard_size="40KB")
    assert ("lm_head.weight" in json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]) == (model == "llama")

    def run(name, **more):
        sections = {"parallel": parallel, "lora": LORA, "optimizer": {"lr": 1e-2},
                    "train": {"init_from": str(base), "steps": 4, "eval_every": 2, "eval_batches": 50, **more}}  # fmt: skip
        return train(files, tmp_path, problem, model=model, run=name, world=4, **sections)

    run("parts", stop_after=2)
    parts, whole = run("parts"), run("whole")
    assert_same_run(whole, parts, step=4)
    saved, written = whole / "checkpoints" / "step-00000004", metrics(whole)[-1]
    loss_of = loss_over(files, problem)
    labels = AutoConfig.from_pretrained(saved)
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base, config=labels), saved).eval()
    assert loss_of(theirs.base_model.model) == pytest.approx(written["valid_loss"], rel=1e-5)
    auto = peft.AutoPeftModelForTokenClassification if problem == "tokens" else peft.AutoPeftModelForSequenceClassification
    direct = auto.from_pretrained(saved, num_labels=3, pad_token_id=labels.pad_token_id).eval()
    given = torch.arange(1, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(direct(given).logits, theirs(given).logits, rtol=0, atol=0)

    merged = merge_run(configuration.load(whole / "config.yaml"))
    network, found = kind.from_pretrained(merged, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert network.config.id2label == dict(enumerate(LABELS))
    assert loss_of(network.eval()) == pytest.approx(written["valid_loss"], rel=1e-5)
    names = [name for file in merged.glob("*.safetensors") for name in safe_open(file, framework="pt").keys()]  # noqa: SIM118
    assert not any("lm_head" in name for name in names)
    assert not (merged / "generation_config.json").exists()
    measured = evaluated(merged, files / f"{problem}.jsonl", tmp_path, parallel, window=LENGTH)["figures"]
    assert measured["accuracy"] == pytest.approx(written["valid_accuracy"], abs=1e-6)


def loss_over(files, problem):
    """What a network's mean loss over the file is."""
    records = [json.loads(line) for line in (files / f"{problem}.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(files / "tokenizer")

    def of(network):
        with torch.inference_mode():
            parts = [plain_loss(network, tokenizer, record, problem, 0.0) for record in records]
        return float(sum(part for part, _ in parts)) / sum(count for _, count in parts)

    return of
