"""Invalid settings of finetuning are refused with one sentence and a fix."""

from __future__ import annotations

import pytest
import yaml
from helpers.sft_runs import make_files, settings

from megatrain.__main__ import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("finetune"))


SENTENCES = {
    "data.chat_template=null": (
        "data.tokenizer={folder}/tokenizer has no chat template; set data.chat_template=FILE"
    ),
    "data.tokenizer=null": "data.tokenizer=null must be set; give the model's tokenizer",
    "data.train=null": "data.train=null must be set; give a file, folder or glob",
    "data.train=nowhere.jsonl": "nowhere.jsonl does not exist",
    "data.document_mask=true": "data.document_mask=true has no effect on chats; remove it",
    "data.train={folder}/text.jsonl": (
        "{folder}/text.jsonl, line 1: missing fields: it has text; required: messages;"
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
    "train.steps=5 train.epochs=1": "train.epochs=1 cannot be combined with train.steps=5",
    "train.steps=null train.epochs=1 lr_schedule.warmup_steps=50": (
        "lr_schedule.warmup_steps=50 must be at most 3, the steps of the schedule"
    ),
    (
        'train.steps=null train.epochs=1 data.train=[{{"path":"{folder}/train.jsonl","weight":1}},'
        '{{"path":"{folder}/valid.jsonl","weight":1}}]'
    ): "train.epochs=1 requires a single dataset, not a blend; set train.steps instead",
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
    error, *fixes = err.splitlines()
    assert error.startswith("error: " + SENTENCES[words].format(folder=files))
    assert len(fixes) <= 1
    assert all(fix.startswith("  fix: ") for fix in fixes)


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
