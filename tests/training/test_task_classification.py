"""Classifiers equal transformers' own with plain torch, on each text alone and unpadded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.classification_runs import (
    LABELS,
    LR,
    MODELS,
    STEPS,
    TEXTS,
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
from helpers.rank_pool import run_ranks
from helpers.reference_model import assert_equal, give_weights, make_stage
from helpers.reference_model import train as train_plainly
from helpers.training_runs import assert_same_run, checked, finetune, metrics

from megatrain.conversion.detect_format import Hints
from megatrain.conversion.inspect import inspect
from megatrain.data.tokenizer import load_tokenizer
from megatrain.errors import ConfigError
from megatrain.evaluation.spec import model_folder
from megatrain.models.classification_config import with_classifier
from megatrain.models.counts import parameter_shapes
from megatrain.models.hf import FAMILIES
from megatrain.training.task_classification import ClassificationTask


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("classification"))


# -- truth from outside --------------------------------------------------------------------------


def reference(files, problem, model, smoothing):
    """Trains transformers' class with its loss and tokenizer, from our initial weights."""
    config = checked(settings(files, problem, model))
    architecture = ClassificationTask().architecture(config)
    network = class_of(problem).from_config(architecture.config, attn_implementation="eager")
    assert give_weights(make_stage(config, architecture), network) == {}
    return train_plainly(
        dict(network.named_parameters()),
        step_loss(network, files, problem, smoothing),
        steps=STEPS,
        lr=LR,
    )


@pytest.fixture(scope="module")
def references(files):
    cache = {}

    def get(*what):
        if what not in cache:
            cache[what] = reference(files, *what)
        return cache[what]

    return get


ROWS = [
    ("single-label", "llama", 1, {}, 0.0),
    ("single-label", "llama", 2, {"tensor": 2, "sequence": True}, 0.0),
    ("single-label", "llama", 2, {"pipeline": 2}, 0.0),
    ("single-label", "llama", 2, {"zero": 3}, 0.0),
    ("single-label", "llama", 4, {"tensor": 2, "pipeline": 2, "schedule": "zb-v"}, 0.0),
    ("single-label", "gpt2", 2, {"tensor": 2}, 0.1),
    ("multi-label", "gpt2", 4, {"tensor": 2, "pipeline": 2}, 0.0),
    ("regression", "llama", 2, {}, 0.0),
    ("tokens", "llama", 4, {"tensor": 2, "sequence": True}, 0.0),
    ("tokens", "gpt2", 2, {"pipeline": 2}, 0.0),
]


@pytest.mark.parametrize(("problem", "model", "world", "parallel", "smoothing"), ROWS, ids=str)
def test_equals_plain_torch(
    problem, model, world, parallel, smoothing, files, references, tmp_path
):
    raw = settings(files, problem, model, parallel=parallel)
    raw["classification"]["label_smoothing"] = smoothing
    assert_equal(
        run_ranks(run_layout, world, raw, folder=tmp_path),
        references(problem, model, smoothing),
        losses=1e-5,
    )


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_equal_those_of_transformers_classifier(family, of_tokens):
    """Names and shapes are equal, whatever the family calls its head."""
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    kind = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    hf = AutoConfig.for_model(family, num_hidden_layers=1, num_labels=3, pad_token_id=0)
    if type(hf) not in kind._model_mapping:
        with pytest.raises(
            ConfigError,
            match=f"task=token-classification is not supported by transformers for {family} models",
        ):
            with_classifier(hf, of_tokens=of_tokens)
        return
    with torch.device("meta"):
        theirs = {
            name: tuple(tensor.shape) for name, tensor in kind.from_config(hf).named_parameters()
        }
    assert parameter_shapes(with_classifier(hf, of_tokens=of_tokens)) == theirs


# -- whole runs ----------------------------------------------------------------------------------


# In training alone: evaluations have neither.
AGAINST_OVERFITTING = {
    "single-label": {"label_smoothing": 0.2, "dropout": 0.3},
    "tokens": {"dropout": 0.3, "augment": "swap"},
}


@pytest.mark.parametrize(
    ("problem", "world", "parallel"),
    [
        ("single-label", 4, {"tensor": 2, "pipeline": 2}),
        ("tokens", 2, {}),
        ("multi-label", 2, {"zero": 3}),
        ("regression", 1, {}),
    ],
)
def test_folder_loads_in_transformers_with_the_metrics_of_the_run(
    problem, world, parallel, files, tmp_path
):
    run = train(
        files,
        tmp_path,
        problem,
        run="run",
        world=world,
        parallel=parallel,
        classification=AGAINST_OVERFITTING.get(problem, {}),
        train={
            "steps": None,
            "epochs": 2,
            "global_batch_size": 4,
        },
        eval={"every": 100, "batches": 50},
    )
    written = metrics(run)[-1]
    folder = run / "checkpoints" / f"step-{written['step']:08d}"
    assert written["step"] == 2 * TEXTS // 4
    network = class_of(problem).from_pretrained(folder).eval()
    if problem != "regression":
        assert network.config.id2label == dict(enumerate(LABELS))
        assert network.config.label2id == {label: number for number, label in enumerate(LABELS)}
    records, tokenizer = read(files, problem), load_tokenizer(folder)
    with torch.inference_mode():
        assert written["valid_loss"] == pytest.approx(
            float(mean_loss(network, tokenizer, records, problem)), rel=1e-5
        )
    assert (run / "confusion_matrix.png").exists() == (problem in ("single-label", "tokens"))
    measured = evaluated(
        folder,
        files / f"{problem}.jsonl",
        tmp_path,
        {"pipeline": 2} if problem in ("tokens", "regression") else {"tensor": 2},
    )
    assert {
        name: measured["figures"][name.removeprefix("valid_")]
        for name in written
        if name.startswith("valid_") and name != "valid_loss"
    } == {
        name: pytest.approx(value, abs=1e-6)
        for name, value in written.items()
        if name.startswith("valid_") and name != "valid_loss"
    }
    pictures = list((tmp_path / "evaluation").glob(f"classification-{problem}.jsonl-*.png"))
    assert len(pictures) == (problem in ("single-label", "tokens"))
    if problem == "single-label":
        assert sum(figures["support"] for figures in measured["classes"].values()) == TEXTS
        assert inspect(folder, Hints(), hashes=True).whole
        assert written["valid_accuracy"] == pytest.approx(accuracy_of(network, tokenizer, records))


def accuracy_of(network, tokenizer, records):
    """Returns the accuracy of a classifier of transformers, with its padding and pooling."""
    texts = [record["text"] for record in records]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        predicted = network(**batch).logits.argmax(-1)
    labels = [
        LABELS.index(label) if isinstance(label, str) else label
        for label in (record["label"] for record in records)
    ]
    return float((predicted == torch.tensor(labels)).float().mean())


def test_start_from_a_language_model_and_from_a_classifier(files, tmp_path):
    """The head is new, or that of a classifier's folder with its labels."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS["gpt2"]))
    language_model.save_pretrained(tmp_path / "lm")
    run = train(
        files,
        tmp_path,
        "single-label",
        model="gpt2",
        run="first",
        world=2,
        parallel={"pipeline": 2},
        train={"steps": 0, "init_from": str(tmp_path / "lm")},
    )
    first = AutoModelForSequenceClassification.from_pretrained(
        run / "checkpoints" / "step-00000000"
    )
    torch.testing.assert_close(
        first.transformer.wte.weight, language_model.transformer.wte.weight, rtol=0, atol=0
    )
    assert float(first.score.weight.detach().std()) == pytest.approx(0.02, rel=0.5)
    raw = settings(
        files,
        "single-label",
        run={"output_dir": str(tmp_path / "second")},
        train={"steps": 0, "init_from": str(run / "checkpoints" / "step-00000000")},
    )
    del raw["model"], raw["classification"]["labels"]
    run_ranks(finetune, 2, raw, folder=tmp_path)
    second = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "second" / "checkpoints" / "step-00000000"
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert second.config.id2label == first.config.id2label


@pytest.mark.parametrize("problem", ["single-label", "tokens"])
def test_epoch_ends_with_empty_microbatches(problem, files, tmp_path):
    """22 texts in steps of 16: the microbatches of the last step hold 4, 2, 0 and 0."""
    steps = {"steps": None, "epochs": 1, "global_batch_size": 16, "micro_batch_size": 4}
    lines = metrics(
        train(files, tmp_path, problem, run="epoch", world=2, train=steps, parallel={"pipeline": 2})
    )
    assert [line["step"] for line in lines if line["step"]] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines if line["step"])


def test_split_of_the_training_texts(files):
    task, config = (
        ClassificationTask(),
        checked(settings(files, "single-label", data={"split": "3,1"})),
    )
    parts = {
        which: task.open(config, task.architecture(config), which) for which in ("train", "valid")
    }
    assert [source.per_epoch for source in parts.values()] == [16, 6]
    seen = [
        {tuple(source.samples.fetch(position).tokens) for position in range(source.per_epoch)}
        for source in parts.values()
    ]
    everything = task.open(
        checked(settings(files, "single-label")), task.architecture(config), "train"
    ).samples
    assert seen[0] | seen[1] == {
        tuple(everything.fetch(position).tokens) for position in range(TEXTS)
    }


def test_resumed_run_stops_early_at_the_same_step(files, tmp_path):
    """Dropout, augmentation and a high learning rate let the loss jump."""
    sections = {
        "classification": {
            "dropout": 0.3,
            "augment": "mix",
            "augment_share": 0.3,
            "labels": LABELS,
        },
        "optimizer": {"lr": 3e-2, "grad_clip": 0.0},
        "eval": {
            "every": 2,
            "batches": 50,
            "early_stopping_patience": 2,
            "early_stopping_metric": "valid_f1_macro",
        },
        "checkpoint": {"save_every": 2, "keep_last": 1},
    }

    def run(name, **more):
        steps = {"steps": 60, **more}
        return train(files, tmp_path, "single-label", run=name, world=2, train=steps, **sections)

    whole = metrics(run("whole"))
    last = whole[-1]["step"]
    figures = {
        line["step"]: line["valid_f1_macro"]
        for line in whole
        if line["step"] and "valid_f1_macro" in line
    }
    best = max(figures.values())
    first_best = min(step for step, value in figures.items() if value == best)
    assert last == first_best + 4 < 60
    assert json.loads((tmp_path / "whole" / "best_checkpoint.json").read_text()) == {
        "step": first_best,
        "metric": "valid_f1_macro",
        "value": best,
    }
    assert (
        model_folder(str(tmp_path / "whole"))
        == tmp_path / "whole" / "checkpoints" / f"step-{first_best:08d}"
    )
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 2, "the newest and the best"
    run("parts", exit_after_step=last - 2)
    run("parts")
    run("parts")  # no steps are left
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=last)


WRONG = {
    "no labels": (
        {"classification": {"labels": None}},
        "classification.labels=null must list the classes in the order of their numbers",
    ),
    "one label": (
        {"classification": {"labels": ["red"]}},
        "must have at least two different names",
    ),
    "a label twice": (
        {"classification": {"labels": ["red", "red"]}},
        "must have at least two different names",
    ),
    "chat settings": (
        {"data": {"packing": True}},
        "data.packing=true has no effect with task=classification",
    ),
    "smoothed numbers": (
        {"classification": {"problem": "regression", "labels": None, "label_smoothing": 0.1}},
        "has no effect with classification.problem=regression",
    ),
    "early stop without evaluations": (
        {"eval": {"early_stopping_patience": 3}},
        "eval.early_stopping_patience=3 requires evaluations, but eval.every=0 disables them",
    ),
    "settings of another task": (
        {"task": "sft"},
        "classification.labels=.* has no effect with task=sft",
    ),
    "a metric that is not there": (
        {"eval": {"every": 1, "early_stopping_patience": 1, "early_stopping_metric": "valid_f1"}},
        "eval.early_stopping_metric=valid_f1 must be a metric of this run's evaluations; "
        "use one of valid_accuracy, valid_f1_macro",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_settings_are_refused(name, files, tmp_path):
    sections, sentence = WRONG[name]
    raw = settings(
        files,
        "single-label",
        run={"output_dir": str(tmp_path / "run")},
        **{key: value for key, value in sections.items() if key != "task"},
    )
    raw["data"]["valid"] = raw["data"]["train"]
    raw["task"] = sections.get("task", raw["task"])
    with pytest.raises((ConfigError, AssertionError), match=sentence):
        run_ranks(finetune, 1, raw, folder=tmp_path) if name.startswith(
            "a metric"
        ) else ClassificationTask().architecture(with_the_task_checked(raw))


def with_the_task_checked(raw):
    config = checked(raw)
    ClassificationTask().check(config)
    return config
