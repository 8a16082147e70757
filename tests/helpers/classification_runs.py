"""Runs of classifiers on any layout, and the same training with transformers."""

from __future__ import annotations

import json

import numpy as np
import torch

from helpers.rank_pool import run_ranks
from helpers.reference_model import run_steps
from helpers.training_runs import checked, finetune, place
from megatrain.data.dataloader import DataLoader
from megatrain.data.shuffle import Shuffle, keyed_integers
from megatrain.data.tokenizer import load_tokenizer, train_tokenizer
from megatrain.distributed.mesh import make_mesh
from megatrain.evaluation.checks import check_model, choose_kind, make_windows
from megatrain.evaluation.spec import EvalSpec, trained_length
from megatrain.evaluation.spec import make_config as make_evaluation
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
