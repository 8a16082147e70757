"""The command line: light help, verbs by name, one sentence for what the user got wrong."""

import dataclasses
import os
import subprocess
import sys

import pytest
import yaml
from helpers.checkout_paths import CONFIGS, PACKAGE, ROOT

from megatrain.__main__ import VERBS, main
from megatrain.config import loader

HEAVY = {"torch", "deepspeed", "transformers", "numpy", "tokenizers", "matplotlib"}


def modules_after(code):
    command = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS), ["config"]])
def test_help_imports_nothing_heavy(words):
    assert not HEAVY & modules_after(f"from megatrain.__main__ import main; main({words})")


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


def test_no_verb_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "usage: megatrain VERB" in capsys.readouterr().err


def test_a_verb_that_is_not_one(capsys):
    assert main(["pretain", "x.yaml"]) == 1
    assert capsys.readouterr().err == "error: `pretain` is not a verb; did you mean `pretrain`?\n"


def test_config_prints_yaml_that_loads_back_to_the_defaults(capsys):
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    raw = yaml.safe_load(printed)
    raw["model"] = ""  # printed as an empty mapping, for fields to be filled in
    assert loader.from_dict(raw) == loader.Config()
    sections = [
        section.default_factory
        for section in dataclasses.fields(loader.Config)
        if section.name not in ("model", "task")
    ]
    settings = [
        f"{setting.name}:" for section in sections for setting in dataclasses.fields(section)
    ]
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  ")] == settings


def test_config_shows_what_a_file_and_overrides_resolve_to(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {steps: 5}\nmodel: {model_type: gpt2}\n")
    assert main(["config", str(file), "optimizer.lr=2e-4", "model.n_layer=3"]) == 0
    shown = loader.from_dict(yaml.safe_load(capsys.readouterr().out))
    assert (shown.train.steps, shown.optimizer.lr, shown.model) == (
        5,
        2e-4,
        {"model_type": "gpt2", "n_layer": 3},
    )


def test_what_the_system_refuses_is_one_sentence(capsys, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").touch()
    assert main(["config", str(tmp_path / "run.yaml"), "train.steps=1", "model=" + "a" * 300]) == 1
    assert capsys.readouterr().err == f"error: {'a' * 300}: File name too long\n"

    def lost(name, words):
        raise FileNotFoundError(2, "No such file or directory", "something of ours")

    monkeypatch.setattr("megatrain.__main__._run_command", lost)
    with pytest.raises(FileNotFoundError):
        main(["config"])


def test_an_option_may_stand_between_a_config_and_its_overrides(capsys):
    assert main(["pretrain", "none.yaml", "--dry-run", "train.steps=1"]) == 1
    assert capsys.readouterr().err == "error: CONFIG=none.yaml does not exist\n"


def test_options_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "none.yaml", "--dry"])
    assert end.value.code == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_before_ranks_meet_one_of_a_machine_speaks(capsys, monkeypatch, rank):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    waited = []
    monkeypatch.setattr("megatrain.__main__.time.sleep", waited.append)
    assert main(["pretrain", "none.yaml"]) == 1
    assert capsys.readouterr().err == (
        "error: CONFIG=none.yaml does not exist\n" if rank == 0 else ""
    )
    assert waited == ([] if rank == 0 else [10.0]), (
        "a launcher ends all as soon as one ends, which must not be before the words"
    )


def test_a_launcher_has_restarts_of_its_own(capsys, monkeypatch):
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert main(["pretrain", str(CONFIGS / "demo_cpu.yaml"), "run.max_restarts=2"]) == 1
    words = capsys.readouterr().err
    assert words.startswith("error: run.max_restarts=2 requires ranks that megatrain starts itself")
    assert "torchrun --max-restarts" in words


@pytest.mark.parametrize(
    ("script", "extra"),
    [("pretrain", []), ("pretrain", ["--local_rank=1"]), ("finetune", ["--local-rank", "1"])],
)
def test_as_a_script_from_anywhere_with_what_launchers_append(tmp_path, script, extra):
    command = [sys.executable, str(PACKAGE / f"{script}.py"), *extra, "none.yaml", "train.steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: CONFIG=none.yaml does not exist\n")


@pytest.mark.parametrize(
    "words", [["config"], ["schedule", "zb-v", "--ranks", "4", "--microbatches", "8"]]
)
def test_a_reader_that_goes_ends_a_command_quietly(words):
    """As `| head` does; 141 is what a shell shows of a command that SIGPIPE ended."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "megatrain", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_connection_that_breaks_is_no_reader_that_goes(monkeypatch):
    def broken(words):
        raise BrokenPipeError

    monkeypatch.setattr("megatrain.__main__._run", broken)
    with pytest.raises(BrokenPipeError):
        main(["config"])


def test_a_script_does_not_hide_modules_behind_ours():
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(PACKAGE)!r}); sys.argv = ['pretrain.py', 'none.yaml']\n"
        f"    runpy.run_path({str(PACKAGE / 'pretrain.py')!r}, run_name='__main__')\n"
        f"except SystemExit:\n    import importlib.util; assert importlib.util.find_spec('supervisor') is None\n"
        f"try:\n    pass"
    )
    assert "megatrain.launch.supervisor" in modules_after(code)
