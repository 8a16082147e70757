"""Classifiers equal transformers' own with plain torch, on each text alone and unpadded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.rank_pool import run_ranks
from helpers.reference_model import assert_equal, give_weights, make_stage, run_steps
from helpers.reference_model import train as train_plainly
from helpers.training_runs import assert_same_run, checked, finetune, metrics, place

from megatrain.conversion.detect_format import Hints
from megatrain.conversion.inspect import inspect
from megatrain.data.dataloader import DataLoader
from megatrain.data.shuffle import Shuffle, keyed_integers
from megatrain.data.tokenizer import load_tokenizer, train_tokenizer
from megatrain.distributed.mesh import make_mesh
from megatrain.errors import ConfigError
from megatrain.evaluation.checks import check_model, choose_kind, make_windows
from megatrain.evaluation.spec import EvalSpec, model_folder, trained_length
from megatrain.evaluation.spec import make_config as make_evaluation
from megatrain.models.classification_config import with_classifier
from megatrain.models.counts import parameter_shapes
from megatrain.models.hf import FAMILIES
from megatrain.training.task_classification import ClassificationTask

VOCABULARY, LENGTH, TEXTS, STEPS, LR = 290, 24, 22, 4, 1e-3
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        **SIZES,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **SIZES,
    },
}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
LABELS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("classification"))


def make_files(folder):
    """Writes texts of different lengths with every kind of label, and a tokenizer."""
    random = np.random.default_rng(0)
    (folder / "text.jsonl").write_text(json.dumps({"text": " ".join(WORDS * 5)}))
    train_tokenizer([folder / "text.jsonl"], vocab_size=VOCABULARY, output=folder / "tokenizer")
    texts = [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(TEXTS)]
    some = [
        sorted({LABELS[i] for i in random.integers(0, 3, 2)})[: int(random.integers(0, 3))]
        for _ in texts
    ]
    records = {
        "single-label": [
            {"text": text, "label": LABELS[i % 3] if i % 2 else i % 3}
            for i, text in enumerate(texts)
        ],
        "multi-label": [
            {"text": text, "labels": labels} for text, labels in zip(texts, some, strict=True)
        ],
        "regression": [{"text": text, "label": round(float(random.normal()), 3)} for text in texts],
        "tokens": [
            {
                "tokens": text.split(),
                "labels": [
                    None if len(word) == 1 else LABELS[len(word) % 3] for word in text.split()
                ],
            }
            for text in texts
        ],
    }
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(files, problem, model="llama", **sections):
    of_tokens = problem == "tokens"
    classification = {} if of_tokens else {"problem": problem}
    if problem != "regression":
        classification["labels"] = LABELS
    raw = {
        "task": "token-classification" if of_tokens else "classification",
        "model": MODELS[model],
        "classification": classification,
        "run": {"output_dir": str(files / "run"), "seed": 7},
        "data": {
            "train": str(files / f"{problem}.jsonl"),
            "tokenizer": str(files / "tokenizer"),
            "sequence_length": LENGTH,
        },
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2},
        "optimizer": {"lr": LR, "grad_clip": 0.5},
        "lr_schedule": {"name": "constant"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return raw


# -- truth from outside --------------------------------------------------------------------------


def of_position(position, seed=7):
    epoch, index = divmod(position, TEXTS)
    return Shuffle(TEXTS, key=("labelled", keyed_integers("source", seed, "train")[0], epoch))(
        index
    )


def plain_loss(network, tokenizer, record, problem, smoothing):
    """Returns the loss of a text, and its number of labels."""
    if problem == "tokens":
        encoded = tokenizer(" ".join(record["tokens"]), return_offsets_mapping=True)
        starts = [
            sum(len(word) + 1 for word in record["tokens"][:i])
            for i in range(len(record["tokens"]))
        ]
        firsts = [
            next(i for i, (_, stop) in enumerate(encoded["offset_mapping"]) if stop > start)
            for start in starts
        ]
        logits = network(torch.tensor([encoded["input_ids"]])).logits[0]
        pairs = [
            (logits[first], LABELS.index(label))
            for first, label in zip(firsts, record["labels"], strict=True)
            if label is not None
        ]
        if not pairs:
            return logits.sum() * 0, 0
        return torch.nn.functional.cross_entropy(
            torch.stack([a for a, _ in pairs]), torch.tensor([b for _, b in pairs]), reduction="sum"
        ), len(pairs)
    tokens = torch.tensor([tokenizer(record["text"])["input_ids"]])
    if smoothing:
        target = torch.tensor(
            [LABELS.index(record["label"]) if isinstance(record["label"], str) else record["label"]]
        )
        return torch.nn.functional.cross_entropy(
            network(tokens).logits, target, label_smoothing=smoothing
        ), 1
    if problem == "single-label":
        right = torch.tensor(
            [record["label"] if isinstance(record["label"], int) else LABELS.index(record["label"])]
        )
    elif problem == "multi-label":
        right = torch.tensor([[float(label in record["labels"]) for label in LABELS]])
    else:
        right = torch.tensor([record["label"]], dtype=torch.float32)
    return network(tokens, labels=right).loss, 1


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


def class_of(problem):
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    return (
        AutoModelForTokenClassification
        if problem == "tokens"
        else AutoModelForSequenceClassification
    )


def read(files, problem):
    return [json.loads(line) for line in (files / f"{problem}.jsonl").read_text().splitlines()]


def mean_loss(network, tokenizer, records, problem, smoothing=0.0):
    parts = [plain_loss(network, tokenizer, record, problem, smoothing) for record in records]
    return sum(part for part, _ in parts) / sum(count for _, count in parts)


def step_loss(network, files, problem, smoothing=0.0):
    """Returns the network's loss of a step; steps count from 1."""
    tokenizer, records = load_tokenizer(files / "tokenizer"), read(files, problem)

    def of(step):
        return mean_loss(
            network,
            tokenizer,
            [records[of_position(position)] for position in range(8 * step - 8, 8 * step)],
            problem,
            smoothing,
        )

    return of


def run_layout(rank, world_size, raw, prepare=None):
    """Trains on this layout, after calling `prepare` with the optimizer's state."""
    from megatrain.training.step_runner import StepRunner

    config, task = checked(raw), ClassificationTask()
    task.check(config)
    architecture, p = task.architecture(config), config.parallel
    mesh = make_mesh(rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size))
    runner = StepRunner(config, architecture, mesh, torch.device("cpu"))
    if prepare is not None:
        prepare(runner.optimizer)
    loader = DataLoader(
        task.open(config, architecture, "train").samples,
        global_batch_size=8,
        micro_batch_size=2,
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
    )
    ran = run_steps(runner, lambda step: loader.microbatches(step - 1), steps=STEPS)
    loader.close()
    return ran


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
            match=f"task=token-classification is not offered by transformers for {family} models",
        ):
            with_classifier(hf, of_tokens=of_tokens)
        return
    with torch.device("meta"):
        theirs = {
            name: tuple(tensor.shape) for name, tensor in kind.from_config(hf).named_parameters()
        }
    assert parameter_shapes(with_classifier(hf, of_tokens=of_tokens)) == theirs


# -- whole runs ----------------------------------------------------------------------------------


def train(files, tmp_path, problem, *, run, world, **sections):
    """Trains with evaluations on the training data."""
    raw = settings(files, problem, run={"output_dir": str(tmp_path / run)}, **sections)
    raw["data"]["valid"] = raw["data"]["train"]
    run_ranks(finetune, world, raw, folder=tmp_path)
    return tmp_path / run


def evaluate(rank, world_size, config, subject):
    from megatrain.evaluation.rank import evaluate_rank

    return evaluate_rank(config, place(rank, world_size), spec=subject)


def evaluated(folder, data, tmp_path, parallel, *, window=None):
    """Returns the results of `megatrain evaluate` on two ranks."""
    words = [f"parallel.{name}={size}" for name, size in parallel.items()]
    config = make_evaluation(
        folder, [f"run.output_dir={tmp_path / 'evaluation'}", "train.micro_batch_size=3", *words]
    )
    (tmp_path / "evaluation").mkdir()
    architecture = check_model(config)
    window, stride = make_windows(
        architecture, window=window, stride=None, trained=trained_length(folder)
    )
    assert window == LENGTH, "what the run saw of a text"
    subject = EvalSpec(
        str(folder),
        (str(data),),
        choose_kind(None, [str(data)], architecture),
        window,
        stride,
        "text",
    )
    return run_ranks(evaluate, 2, config, subject, folder=tmp_path)[0]


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
        texts = [record["text"] for record in records]
        batch = tokenizer(
            texts, padding=True, return_tensors="pt", return_token_type_ids=False
        )  # their own padding and pooling
        with torch.inference_mode():
            told = network(**batch).logits.argmax(-1)
        right = [
            LABELS.index(label) if isinstance(label, str) else label
            for label in (record["label"] for record in records)
        ]
        assert written["valid_accuracy"] == pytest.approx(
            float((told == torch.tensor(right)).float().mean())
        )


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
