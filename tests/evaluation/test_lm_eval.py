"""Tasks of lm-evaluation-harness give the metrics of its own transformers model."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.rank_pool import run_ranks

from megatrain.data.tokenizer import load_tokenizer, train_tokenizer
from megatrain.distributed.env import RankEnv
from megatrain.errors import ConfigError
from megatrain.evaluation.spec import EvalSpec, make_config

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'megatrain[eval]'"
)

CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/questions.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING_TASK = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/texts.jsonl"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
TASKS = ("local_choice", "local_rolling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks and their data, and a model with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("harness")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "choice.yaml").write_text(CHOICE_TASK.format(folder=folder))
    (folder / "tasks" / "rolling.yaml").write_text(ROLLING_TASK.format(folder=folder))
    questions = [
        {
            "question": f"Which is {i}?",
            "choices": ["a tensor rank", "the last stage", "none"],
            "answer": i % 3,
        }
        for i in range(9)
    ]
    texts = [
        "Ranks fill a box, tensor fastest, so that they are neighbours. " * (1 + i)
        for i in range(3)
    ]
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in questions)
    )
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    train_tokenizer([folder / "texts.jsonl"], vocab_size=290, output=folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    load_tokenizer(folder / "model").save_pretrained(folder / "model")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def datasets_in(home):
    """Keeps the cache of datasets in a folder and the harness offline."""
    import datasets

    settings = datasets.config
    there = {"HF_DATASETS_CACHE": Path(home), "HF_DATASETS_OFFLINE": True, "HF_HUB_OFFLINE": True}
    before = {name: getattr(settings, name) for name in there}
    for name, value in there.items():
        setattr(settings, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def on_rank(rank, world_size, config, subject, home):
    from megatrain.evaluation.rank import evaluate_rank

    with datasets_in(f"{home}/{rank}"):
        return evaluate_rank(
            config, RankEnv(rank, world_size, rank, world_size, "127.0.0.1", 29500), spec=subject
        )


def asked(folder, *, tasks=TASKS):
    return EvalSpec(
        str(folder / "model"),
        (),
        "harness",
        64,
        64,
        "text",
        tasks=tasks,
        include_path=str(folder / "tasks"),
    )


@pytest.mark.parametrize("words", [["parallel.tensor=2"], ["parallel.pipeline=2"]])
def test_metrics_equal_the_harness_model(folder, tmp_path, words):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    theirs = HFLM(
        pretrained=model, tokenizer=load_tokenizer(folder / "model"), batch_size=2, max_length=64
    )
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    with datasets_in(tmp_path / "theirs"):
        expected = simple_evaluate(
            model=theirs,
            tasks=list(TASKS),
            task_manager=tasks,
            log_samples=False,
            bootstrap_iters=0,
        )["results"]
    config = make_config(folder / "model", [f"run.output_dir={tmp_path}", *words])
    ours = run_ranks(on_rank, 2, config, asked(folder), str(tmp_path / "home"), folder=tmp_path)[0][
        "figures"
    ]
    for name in ("acc", "acc_norm"):
        assert ours[f"local_choice/{name}"] == expected["local_choice"][f"{name},none"]
    for name in ("word_perplexity", "bits_per_byte"):
        assert ours[f"local_rolling/{name}"] == pytest.approx(
            expected["local_rolling"][f"{name},none"], rel=1e-5
        )


def test_unknown_task_is_rejected(folder, monkeypatch):
    from megatrain.evaluation import lm_eval as lm_eval_module
    from megatrain.evaluation.lm_eval import run_tasks

    every = lm_eval_module.TaskManager  # takes ten seconds to list the harness's own
    monkeypatch.setattr(
        lm_eval_module,
        "TaskManager",
        lambda include_path, include_defaults=True: every(
            include_path=include_path, include_defaults=False
        ),
    )
    with pytest.raises(ConfigError, match="--tasks=no_such is not a task of lm-evaluation-harness"):
        run_tasks(asked(folder, tasks=("no_such",)), None, object(), 0)
