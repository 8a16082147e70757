"""Stopped, killed and interrupted runs end with the losses and bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time

import pytest
import yaml
from helpers import readme_commands
from helpers.rank_pool import run_ranks
from helpers.training_runs import (
    VOCABULARY,
    assert_same_run,
    merge_sections,
    metrics,
    pretrain,
    write_tokens,
)

from megatrain import files
from megatrain.__main__ import main
from megatrain.checkpoint import manifest
from megatrain.telemetry import events

SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    **SIZES,
}
MODELS = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        **SIZES,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def settings(model, data, output, **sections):
    """Returns a run's config as nested mappings."""
    raw = {
        "run": {"output_dir": str(output)},
        "model": MODELS[model],
        "train": {"steps": 6, "global_batch_size": 8, "micro_batch_size": 2},
        "eval": {"every": 3, "batches": 1},
        "checkpoint": {"save_every": 2, "keep_last": 0},
        "data": {"train": str(data), "valid": str(data), "sequence_length": 16},
    }
    return merge_sections(raw, sections)


LAYOUTS = [
    ("gpt2", 1, "fp32", {}),
    ("gpt2", 1, "bf16", {}),
    *[("gpt2", 2, "fp32", {"parallel": {"zero": stage}}) for stage in (0, 1, 2, 3)],
    *[("llama", 2, "bf16", {"parallel": {"zero": stage}}) for stage in (0, 1, 2, 3)],
    ("tied", 2, "fp32", {"parallel": {"pipeline": 2}}),
    ("gpt2", 2, "bf16", {"parallel": {"tensor": 2, "sequence": True}}),
    ("tied", 4, "bf16", {"parallel": {"tensor": 2, "pipeline": 2}}),
    ("llama", 4, "fp32", {"parallel": {"tensor": 2, "zero": 3}}),
    ("llama", 1, "fp32", {"optimizer": {"name": "lion"}}),
    ("llama", 2, "bf16", {"optimizer": {"name": "sgd"}}),
    ("llama", 2, "fp32", {"parallel": {"offload": "cpu"}}),
]


def _name(model, world, dtype, sections):
    return "-".join(
        [
            model,
            f"w{world}",
            dtype,
            *(f"{k}{v}" for section in sections.values() for k, v in section.items()),
        ]
    )


OLD_SECTIONS = {
    "eval": {"every": "eval_every", "batches": "eval_batches"},
    "checkpoint": {"save_every": "save_every", "keep_last": "keep_last"},
}


def rename_back(run):
    """Gives the newest checkpoint and metrics.jsonl of a run the names of earlier versions."""
    checkpoint = max((run / "checkpoints").iterdir())
    state = json.loads((checkpoint / "train_state.json").read_text())
    for section, names in OLD_SECTIONS.items():
        values = state["config"].pop(section)
        state["config"]["train"] |= {old: values[new] for new, old in names.items()}
    (checkpoint / "train_state.json").unlink()
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    manifest.write(
        checkpoint,
        [
            manifest.make_record(checkpoint, path)
            for path in paths
            if path.name != manifest.MANIFEST
        ],
    )
    metrics_file = run / "metrics.jsonl"
    text = metrics_file.read_text().replace("checkpoint_blocking_seconds", "save_stall_seconds")
    metrics_file.write_text(text)


def test_run_folder_of_an_earlier_version_is_resumed(data, tmp_path):
    for folder, exits in {"whole": [None], "parts": [3, None]}.items():
        for exit_step in exits:
            raw = settings("llama", data, tmp_path / folder, train={"exit_after_step": exit_step})
            run_ranks(pretrain, 1, raw, folder=tmp_path)
            if exit_step is not None:
                rename_back(tmp_path / folder)
    parts = [
        {name: value for name, value in line.items() if name != "save_stall_seconds"}
        for line in metrics(tmp_path / "parts")
    ]
    assert parts == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("model", "world", "dtype", "sections"), LAYOUTS, ids=[_name(*row) for row in LAYOUTS]
)
def test_resumed_run_is_bit_identical(model, world, dtype, sections, data, tmp_path):
    def run(folder, **train):
        raw = settings(
            model,
            data,
            tmp_path / folder,
            train={"dtype": dtype, **train},
            **json.loads(json.dumps(sections)),
        )
        run_ranks(pretrain, world, raw, folder=tmp_path)

    run("whole")
    run("parts", exit_after_step=2)
    run("parts", exit_after_step=4)
    run("parts")
    parts = metrics(tmp_path / "parts")
    # An end is also evaluated, whatever the interval.
    assert [line.pop("valid_loss") for line in parts if line["step"] in (2, 4)]
    (tmp_path / "parts" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in parts)
    )
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# -- whole runs, as a user starts them -----------------------------------------------------------


def start(folder, raw):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    return readme_commands.start("pretrain", file, folder=folder)


def wait_for(path, lines, command):
    """Waits until the file has that many lines."""
    while not command.has_ended(0.01):
        if path.exists() and path.read_text().count("\n") >= lines:
            return
    raise AssertionError(command.wait())


@pytest.mark.parametrize(
    ("model", "dtype", "parallel"),
    [("gpt2", "fp32", {}), ("llama", "bf16", {"tensor": 2, "pipeline": 2})],
    ids=["one-rank-fp32", "tensor2-pipeline2-bf16"],
)
def test_kill_at_any_moment_and_restart(model, dtype, parallel, data, tmp_path):
    moments = random.Random(model)
    sections = {
        "train": {"dtype": dtype, "steps": 30},
        "checkpoint": {"save_every": 1, "keep_last": 3},
        "eval": {"every": 0},
        "parallel": parallel,
    }
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = settings(model, data, tmp_path / "whole" / "run", **sections)
    ended = start(tmp_path / "whole", whole).wait()
    assert ended.code == 0, ended
    killed = settings(model, data, tmp_path / "killed" / "run", **sections)
    log = tmp_path / "killed" / "run" / "metrics.jsonl"
    for reached in (moments.randint(2, 9), moments.randint(11, 20)):
        command = start(tmp_path / "killed", killed)
        wait_for(log, reached, command)
        time.sleep(moments.random() * 0.15)
        os.kill(command.pid, signal.SIGKILL)  # the ranks die with their parent
        ended = command.wait()
        assert ended.code in (-signal.SIGKILL, 0), (
            ended
        )  # 0: on a very busy machine it was through before
    ended = start(tmp_path / "killed", killed).wait()
    assert ended.code == 0, ended
    assert "resuming from" in ended.out
    assert_same_run(tmp_path / "whole" / "run", tmp_path / "killed" / "run", step=30)
    assert [line["step"] for line in metrics(tmp_path / "killed" / "run")] == list(range(1, 31))
    folders = sorted(path.name for path in (tmp_path / "killed" / "run" / "checkpoints").iterdir())
    assert folders[-3:] == ["step-00000028", "step-00000029", "step-00000030"]
    assert folders[:-3] in ([], ["step-00000027"]), (
        "nothing goes at the first step after a resume, which may have been the last"
    )
    assert main(["report", str(tmp_path / "killed" / "run")]) == 0
    assert "Finished after step 30" in (tmp_path / "killed" / "run" / "report.html").read_text()
    assert_events(
        tmp_path / "killed" / "run", starts=(2, 3)
    )  # 2: a kill that came while it started
    logs = sorted((tmp_path / "killed" / "run" / "logs").glob("*.jsonl"))
    assert len(logs) == parallel.get("pipeline", 1) * parallel.get("tensor", 1)
    for log in logs:
        assert_rank_log(log, ranks=len(logs), pipelines=parallel.get("pipeline", 1))


def assert_events(run, *, starts):
    """Checks the events of a run that was killed, restarted and finished at step 30."""
    told = list(events.read(run))
    assert [event.event for event in told].count("start") in starts
    start, end = told[0], told[-1]
    assert (start.event, start.fields["attempt"], start.fields["hosts"]) == (
        "start",
        1,
        [socket.gethostname()],
    )
    assert set(start.fields["versions"]) == {
        "megatrain",
        "python",
        "torch",
        "deepspeed",
        "transformers",
    }
    assert (end.event, end.step) == ("finish", 30)
    resumes = [event for event in told if event.event == "resume"]
    assert 1 <= len(resumes) < max(starts)
    for resume in resumes:
        assert resume.fields["from"].endswith(f"step-{resume.step:08d}")
        assert "resuming from" in resume.fields["reason"]
    assert [event.step for event in told if event.event == "save"][-1] == 30


def assert_rank_log(path, *, ranks, pipelines):
    """Checks that a rank's log has its coordinates and the times of each logged step."""
    lines = list(files.read(path))
    figures = [line for line in lines if line["message"] == "figures"]
    assert {line["pipeline"] for line in figures} == {figures[0]["rank"] // (ranks // pipelines)}
    assert {line["step"] for line in figures} == set(range(1, 31))
    for line in figures:
        assert min(line["forward"], line["backward"], line["peak_memory"]) > 0
        assert line["forward"] + line["backward"] + line["waiting"] < line["seconds"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_saves_and_stops_the_run(number, data, tmp_path):
    raw = settings(
        "llama",
        data,
        tmp_path / "run",
        train={"steps": 2000},
        checkpoint={"save_every": 0},
        eval={"every": 0},
        parallel={"pipeline": 2} if number == signal.SIGTERM else {},
    )
    command = start(tmp_path, raw)
    wait_for(tmp_path / "run" / "metrics.jsonl", 3, command)
    os.kill(command.pid, number)
    ended = command.wait()
    assert "stopped by a signal after step" in ended.out
    assert ended.code == 0, ended
    last = metrics(tmp_path / "run")[-1]["step"]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{last:08d}"
    assert manifest.find_problem(saved, hashes=True) is None
    assert [(event.event, event.step) for event in events.read(tmp_path / "run")][1:] == [
        ("save", last),
        ("stop", last),
    ]
