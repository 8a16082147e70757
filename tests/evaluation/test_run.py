"""Metrics on every layout equal those of transformers; invalid evaluations are rejected."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from helpers.rank_pool import run_ranks

from megatrain.__main__ import main
from megatrain.data.indexed_dataset import IndexedWriter
from megatrain.data.tokenizer import load_tokenizer, train_tokenizer
from megatrain.distributed.env import RankEnv
from megatrain.evaluation.spec import EvalSpec, make_config

WINDOW, STRIDE = 24, 10
TEXTS = [
    "Ranks fill a box of pipeline x data x tensor, tensor fastest, so that tensor ranks, "
    "which talk most, are neighbours.",
    "A stage\n\n takes a slice; — one rank takes all of it.",
    "x",
    " leading and trailing ",
    "Shapes: S sequence, B micro-batch, H hidden, F features, V vocabulary. " * 3,
]
QUESTIONS = [
    {
        "question": f"Which rank is number {i}?",
        "choices": ["a tensor rank", "the last stage of all", "none"],
        "answer": i % 3,
    }
    for i in range(7)
]
VOCABULARY = 301  # padded on two ranks
MODELS = {
    "llama": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, questions, a tokenizer, an indexed dataset of the texts, and transformers models."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    )
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    )
    train_tokenizer([folder / "texts.jsonl"], vocab_size=290, output=folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for number, (name, fields) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        config = AutoConfig.for_model(**fields, bos_token_id=0, eos_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with IndexedWriter(folder / "indexed", vocab_size=VOCABULARY) as writer:
        for text in TEXTS:
            writer.add(torch.tensor([*tokenizer(text)["input_ids"], 0]).numpy())
    return folder


def evaluate_on_rank(rank, world_size, config, subjects):
    from megatrain.evaluation.rank import evaluate_rank

    place = RankEnv(rank, world_size, rank, world_size, "127.0.0.1", 29500)
    return [evaluate_rank(config, place, spec=subject) for subject in subjects]


def evaluated(folder, model, world, words, *, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    config = make_config(
        folder / model, [f"run.output_dir={output}", "train.micro_batch_size=2", *words]
    )
    subjects = [
        EvalSpec(str(folder / model), (str(folder / data),), kind, WINDOW, STRIDE, "text")
        for kind, data in (
            ("perplexity", "texts.jsonl"),
            ("perplexity", "indexed"),
            ("choices", "questions.jsonl"),
        )
    ]
    results = run_ranks(evaluate_on_rank, world, config, subjects, folder=tmp_path)
    for theirs in results:
        assert [result["figures"] for result in theirs] == [
            result["figures"] for result in results[0]
        ]
    return results[0], output


@pytest.fixture(scope="module")
def reference(folder):
    """Losses of transformers over windows, and the accuracies of its choices."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder / "tokenizer")
    cache = {}

    @torch.inference_mode()
    def of(name):
        if name not in cache:
            network = AutoModelForCausalLM.from_pretrained(
                folder / name, dtype=torch.float32
            ).eval()
            loss = tokens = 0
            for text in TEXTS:
                row = [0, *tokenizer(text)["input_ids"]]
                stops = [*range(min(WINDOW, len(row) - 1), len(row) - 1, STRIDE), len(row) - 1]
                for before, stop in pairwise([0, *stops]):
                    seen = torch.tensor([row[max(0, stop - WINDOW) : stop + 1]])
                    labels = seen.clone()
                    labels[:, : -(stop - before)] = -100
                    loss += float(network(seen, labels=labels).loss) * (stop - before)
                tokens += len(row) - 1
            cache[name] = loss / tokens, tokens, _accuracies(network, tokenizer)
        return cache[name]

    return of


def _accuracies(network, tokenizer):
    right = []
    for question in QUESTIONS:
        before = len(tokenizer(question["question"])["input_ids"])
        likely = []
        for choice in question["choices"]:
            row = torch.tensor([tokenizer(f"{question['question']} {choice}")["input_ids"]])
            logprobs = network(row).logits[0, before - 1 : -1].log_softmax(-1)
            likely.append(float(logprobs.gather(1, row[0, before:, None]).sum()))
        by_byte = [
            value / len(choice) for value, choice in zip(likely, question["choices"], strict=True)
        ]
        right.append(
            [int(values.index(max(values)) == question["answer"]) for values in (likely, by_byte)]
        )
    return [sum(column) / len(right) for column in zip(*right, strict=True)]


LAYOUTS = [
    ("llama", 1, []),
    ("gpt2", 1, []),
    ("llama", 2, ["parallel.tensor=2"]),
    ("llama", 2, ["parallel.tensor=2", "parallel.sequence=true"]),
    ("llama", 2, ["parallel.pipeline=2"]),
    ("gpt2", 2, ["parallel.pipeline=2"]),
    ("llama", 2, ["parallel.data=2"]),
    ("gpt2", 4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    ("llama", 4, ["parallel.pipeline=2"]),
]


def only_file(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


@pytest.mark.parametrize(
    ("model", "world", "words"),
    LAYOUTS,
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_metrics_equal_transformers(folder, reference, tmp_path, model, world, words):
    (texts, indexed, questions), output = evaluated(folder, model, world, words, tmp_path=tmp_path)
    loss, tokens, accuracies = reference(model)
    figures = texts["figures"]
    assert figures["loss"] == pytest.approx(loss, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    sizes = (figures["documents"], figures["tokens"], figures["bytes"], figures["words"])
    assert sizes == (
        len(TEXTS),
        tokens,
        sum(len(t.encode()) for t in TEXTS),
        sum(len(t.replace("\n\n ", " ").split(" ")) for t in TEXTS),
    )
    assert figures["bits_per_byte"] == pytest.approx(
        loss * tokens / math.log(2) / sizes[2], rel=1e-6
    )
    assert indexed["figures"] == figures  # the same documents
    assert [questions["figures"]["acc"], questions["figures"]["acc_norm"]] == accuracies
    written = json.loads(only_file(output, "perplexity-texts.jsonl-*.json").read_text())
    assert written["figures"] == figures
    assert written["settings"]["window"] == WINDOW
    assert len(written["model"]["sha256"]) == len(written["data"]["sha256"]) == 64


def scores_on_rank(rank, world_size, config, folder, rows):
    from megatrain.distributed import device as device_module
    from megatrain.distributed.mesh import make_mesh
    from megatrain.evaluation.checks import check_model
    from megatrain.evaluation.rank import open_scorer

    p = config.parallel
    mesh = make_mesh(rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size))
    device = device_module.select_device(
        RankEnv(rank, world_size, rank, world_size, "127.0.0.1", 29500)
    )
    return list(open_scorer(folder, config, check_model(config), mesh, device).scores(rows))


@pytest.mark.parametrize("words", [["parallel.tensor=2"], ["parallel.pipeline=2"]])
def test_scores_of_single_rows(folder, tmp_path, words):
    """Scores are in the order of rows, whatever their lengths."""
    from transformers import AutoModelForCausalLM

    from megatrain.evaluation.loglikelihood import make_row

    generator = torch.Generator().manual_seed(3)
    network = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    sequences = [
        torch.randint(0, VOCABULARY, (int(length),), generator=generator).tolist()
        for length in (3, 30, 12, 7, 31, 2, 15)
    ]
    with torch.inference_mode():
        for number, sequence in enumerate(sequences):
            # Greedy tokens of the model, or of the first half of its vocabulary.
            for _ in range(3):
                part = network(torch.tensor([sequence])).logits[
                    0, -1, : None if number % 2 == 0 else VOCABULARY // 2
                ]
                sequence.append(int(part.argmax()))
        expected = []
        for sequence in sequences:
            logprobs = network(torch.tensor([sequence])).logits[0, -4:-1].log_softmax(-1)
            last = torch.tensor(sequence[-3:])[-len(logprobs) :]
            expected.append(
                (
                    float(logprobs[-len(last) :].gather(1, last[:, None]).sum()),
                    bool((logprobs.argmax(-1) == last).all()),
                )
            )
    rows = [make_row(sequence, scored=min(3, len(sequence) - 1)) for sequence in sequences]
    config = make_config(folder / "llama", ["train.micro_batch_size=2", *words])
    for scores in run_ranks(scores_on_rank, 2, config, folder / "llama", rows, folder=tmp_path):
        assert [score.greedy for score in scores] == [greedy for _, greedy in expected]
        assert [score.greedy for score in scores[::2]] == [True] * 4
        assert [score.loglikelihood for score in scores] == pytest.approx(
            [value for value, _ in expected], rel=2e-6
        )


def test_hashes_identify_model_and_data(folder, tmp_path):
    from megatrain.evaluation.fingerprint import hash_data, hash_model

    copy = tmp_path / "another name"
    shutil.copytree(folder / "llama", copy)
    assert hash_model(copy) == hash_model(folder / "llama") != hash_model(folder / "gpt2")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert hash_model(copy) != hash_model(folder / "llama")
    assert hash_data([str(folder / "texts.jsonl")]) != hash_data([str(folder / "indexed")])


def test_command_on_two_ranks(folder, tmp_path):
    """Standard output has one JSON object."""
    command = [
        sys.executable,
        "-m",
        "megatrain",
        "evaluate",
        str(folder / "llama"),
        str(folder / "texts.jsonl"),
        "--json",
        "--window",
        "24",
        "--stride",
        "10",
        "parallel.tensor=2",
        f"run.output_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads(
        only_file(tmp_path / "run", "perplexity-texts.jsonl-*.json").read_text()
    )
    assert printed["settings"]["tensor"] == 2


def test_python_function_on_two_ranks(folder, tmp_path):
    code = (
        "from megatrain.evaluation.run import evaluate\n"
        f"result = evaluate({str(folder / 'llama')!r}, {str(folder / 'texts.jsonl')!r},\n"
        "    window=24,\n"
        f"    overrides={{'parallel.pipeline': 2, 'run.output_dir': {str(tmp_path / 'run')!r}}})\n"
        "print(result.path, result.metrics['loss'], result.content['settings']['pipeline'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    path, loss, pipeline = done.stdout.splitlines()[-1].split()
    file = only_file(tmp_path / "run", "perplexity-texts.jsonl-*.json")
    assert path == str(file)
    assert float(loss) == json.loads(file.read_text())["figures"]["loss"]
    assert pipeline == "2"


INVALID = {
    "{adapters} {texts}": (
        "{adapters} contains an adapter without its base model; "
        "`megatrain finetune CONFIG --merge` writes"
    ),
    "nowhere {texts}": (
        "nowhere does not exist; give a checkpoint, a Hugging Face folder or a run's folder"
    ),
    "{empty} {texts}": (
        "{empty} has no config.json; use a checkpoint, a Hugging Face folder or a run's folder"
    ),
    "{model} nowhere.jsonl": "nowhere.jsonl does not exist",
    "{model} nowhere-*.jsonl": "nowhere-*.jsonl matches no file",
    "{model}": "DATA (files, or an indexed dataset's prefix) or --tasks is required",
    "{model} {texts} optimizer.lr=1": (
        "optimizer.lr=1 is not supported by `megatrain evaluate`; supported: run.output_dir"
    ),
    "{model} {texts} parallel.tensor=3": "parallel.tensor=3 must divide num_attention_heads=4",
    "{model} {texts} parallel.pipeline=4": (
        "parallel.pipeline=4 must be at most num_hidden_layers=3"
    ),
    "{model} {texts} train.dtype=fp16": "train.dtype=fp16 requires a GPU",
    "{model} {texts} --window 65": "--window=65 must be between 1 and the model's 64 positions",
    "{model} {texts} --window 8 --stride 9": "--stride=9 must be between 1 and --window=8",
    "{model} {texts} --limit 3": "--limit=3 requires --tasks; give --tasks too",
    "{model} {texts} --tasks arc_easy": "--tasks=arc_easy requires no DATA",
}


@pytest.mark.parametrize("words", INVALID)
def test_invalid_evaluations_are_rejected(folder, capsys, monkeypatch, words):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(
        "megatrain.evaluation.run.run_local",
        lambda *args, **more: pytest.fail("ranks were started"),
    )
    names = {
        "model": folder / "llama",
        "texts": folder / "texts.jsonl",
        "adapters": folder / "adapters",
        "empty": folder / "empty",
    }
    names["empty"].mkdir(exist_ok=True)
    names["adapters"].mkdir(exist_ok=True)
    (names["adapters"] / "adapter_config.json").write_text("{}")
    assert main(["evaluate", *words.format(**names).split()]) == 1
    assert capsys.readouterr().err.startswith(f"error: {INVALID[words].format(**names)}")
