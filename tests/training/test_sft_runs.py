"""Finetuning runs: resume, generation config and refused settings."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers.chat_templates import CHATML, WITH_MARKS
from helpers.rank_pool import run_ranks
from helpers.training_runs import assert_same_run, finetune, metrics
from test_task_sft import MODEL, make_files, settings

from megatrain.__main__ import main
from megatrain.models.config import load_hf_config, read_config

VOCABULARY, LENGTH, CHATS, STEPS, LR = 290, 96, 20, 4, 1e-3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("data"))


def test_resumed_run_is_bit_identical_and_its_folder_generates_chats(files, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def run(folder, **train):
        raw = settings(
            files,
            run={"output_dir": str(tmp_path / folder)},
            data={"packing": True},
            parallel={"pipeline": 2},
            train={
                "steps": None,
                "epochs": 3,
                "global_batch_size": 4,
                **train,
            },
            eval={"every": 3, "batches": 50},
        )
        run_ranks(finetune, 2, raw, folder=tmp_path)

    run("whole")
    last = metrics(tmp_path / "whole")[-1]["step"]
    assert last >= 6
    run("parts", exit_after_step=3)
    run("parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=last)
    assert "epochs: 3" in (tmp_path / "whole" / "config.yaml").read_text()
    saved = tmp_path / "whole" / "checkpoints" / f"step-{last:08d}"
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template == CHATML
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.generation_config.eos_token_id == [
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        0,
    ]
    # every validation chat once, though more batches were asked for
    total, count = 0.0, 0
    for line in (files / "valid.jsonl").read_text().splitlines():
        made = tokenizer.apply_chat_template(
            json.loads(line)["messages"],
            chat_template=WITH_MARKS,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        wanted = torch.tensor(made["assistant_masks"][1:]) == 1
        tokens = torch.tensor(made["input_ids"])
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0]
        total += float(
            torch.nn.functional.cross_entropy(logits[wanted], tokens[1:][wanted], reduction="sum")
        )
        count += int(wanted.sum())
    assert abs(metrics(tmp_path / "whole")[-1]["valid_loss"] - total / count) < 1e-5


def test_generation_config_is_kept_with_the_end_of_answers(tmp_path):
    """The generation config of the tokenizer's folder is kept, also if transformers rejects it."""
    from megatrain.checkpoint.hf_metadata import Chat, write_hf_metadata

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir()
    (theirs / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": false, "eos_token_id": 5}'
    )
    for name in (
        "tokenizer.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors",
        "train_state.json",
        "modeling.py",
    ):
        (theirs / name).write_text("{}")
    write_hf_metadata(
        ours,
        read_config(load_hf_config(MODEL)),
        dtype=torch.float32,
        tokenizer=str(theirs),
        chat=Chat("mine", [7, 5]),
    )
    assert json.loads((ours / "generation_config.json").read_text()) == {
        "temperature": 0.6,
        "do_sample": False,
        "eos_token_id": [7, 5],
    }
    assert (ours / "chat_template.jinja").read_text() == "mine"
    assert {path.name for path in ours.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }


SENTENCES = {
    "data.chat_template=null": (
        "data.tokenizer={folder}/tokenizer has no chat template; set data.chat_template=FILE"
    ),
    "data.tokenizer=null": "data.tokenizer=null must be set; give the model's tokenizer",
    "data.train=null": "data.train=null must be set; give a file, folder or glob",
    "data.train=nowhere.jsonl": "nowhere.jsonl does not exist",
    "data.document_mask=true": "data.document_mask=true has no effect on chats; remove it",
    "data.train={folder}/text.jsonl": (
        "{folder}/text.jsonl, line 1: missing fields: it has text, and one of these is needed: "
        "messages;"
    ),
    "data.train={folder}/indexed": (
        "data.train={folder}/indexed must be files of chats, not an indexed dataset"
    ),
    "train.init_from={folder}/run": (
        "{folder}/run is a run folder, not a model; use one of its checkpoints, such as "
        "{folder}/run/checkpoints/step-2"
    ),
    "checkpoint.resume={folder}/run": (
        "checkpoint.resume={folder}/run has no manifest.json; use one of the run's checkpoints, "
        "such as {folder}/run/checkpoints/step-2"
    ),
    "checkpoint.resume={folder}/run/checkpoints": (
        "checkpoint.resume={folder}/run/checkpoints has no manifest.json; use one of the run's "
        "checkpoints, such as {folder}/run/checkpoints/step-2"
    ),
    "data.sequence_length=24 data.too_long=error": "{folder}/train.jsonl, line 1: takes ",
    "train.init_from={folder}/gpt2": (
        "train.init_from={folder}/gpt2 does not fit the model: missing: model.embed_tokens.weight, "
    ),
    "train.init_from=nowhere": "train.init_from=nowhere does not exist",
    "train.steps=null train.epochs=0": "train.epochs=0 must be at least 1",
    "train.steps=5 train.epochs=1": (
        "train.steps, train.tokens and train.epochs=5, null, 1 are given together; give one of them"
    ),
    "train.steps=null train.epochs=1 lr_schedule.warmup_steps=50": (
        "lr_schedule.warmup_steps=50 is more than the 3 steps of the schedule"
    ),
    'train.steps=null train.epochs=1 data.train=[{{"path":"{folder}/train.jsonl","weight":1}},{{"path":"{folder}/valid.jsonl","weight":1}}]': "train.epochs=1 has no meaning for a blend of data; give train.steps",
}


@pytest.mark.parametrize("words", SENTENCES)
def test_invalid_settings_are_refused(words, files, tmp_path, capfd, monkeypatch):
    for name, value in (("DS_ACCELERATOR", "cpu"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(files, run={"output_dir": str(tmp_path / "run")})))
    (files / "indexed.idx").touch()
    for step in (1, 2):
        (files / f"run/checkpoints/step-{step}").mkdir(parents=True, exist_ok=True)
    assert main(["finetune", str(file), *words.format(folder=files).split()]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: " + SENTENCES[words].format(folder=files))
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "word",
    [
        "data.packing=true",
        "data.chat_template=x",
        "data.train_on=all",
        "data.too_long=skip",
        "train.epochs=1 train.steps=null",
    ],
)
def test_pretraining_refuses_settings_of_finetuning(word, files, tmp_path, capfd):
    file = tmp_path / "run.yaml"
    raw = settings(files, run={"output_dir": str(tmp_path / "run")})
    del raw["data"]["chat_template"]
    file.write_text(yaml.safe_dump(raw))
    assert main(["pretrain", str(file), *word.split()]) == 1
    assert "finetun" in capfd.readouterr().err
