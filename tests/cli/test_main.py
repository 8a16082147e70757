"""The command line: light help, commands by name, one sentence for errors of the user."""

import dataclasses
import os
import subprocess
import sys

import pytest
import yaml
from helpers.checkout_paths import CONFIGS, PACKAGE, ROOT

from megatrain.cli.main import COMMANDS, main
from megatrain.config import loader

MISSING_CONFIG = (
    "error: CONFIG=none.yaml does not exist; give a YAML file of settings; "
    "`megatrain config` prints one\n"
)
HEAVY = {"torch", "deepspeed", "transformers", "numpy", "tokenizers", "matplotlib"}


def modules_after(code):
    command = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\n"
    command += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in COMMANDS), ["config"]]
)
def test_help_imports_nothing_heavy(words):
    assert not HEAVY & modules_after(f"from megatrain.__main__ import main; main({words})")


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_no_command_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "usage: megatrain COMMAND" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert main(["pretain", "x.yaml"]) == 1
    assert (
        capsys.readouterr().err == "error: `pretain` is not a command; did you mean `pretrain`?\n"
    )


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


def test_os_errors_are_one_line(capsys, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").touch()
    assert main(["config", str(tmp_path / "run.yaml"), "train.steps=1", "model=" + "a" * 300]) == 1
    assert capsys.readouterr().err == f"error: {'a' * 300}: File name too long\n"

    def lost(name, arguments):
        raise FileNotFoundError(2, "No such file or directory", "a file of megatrain")

    monkeypatch.setattr("megatrain.cli.main._run_command", lost)
    with pytest.raises(FileNotFoundError):
        main(["config"])


def test_option_between_config_and_overrides(capsys):
    assert main(["pretrain", "none.yaml", "--dry-run", "train.steps=1"]) == 1
    assert capsys.readouterr().err == MISSING_CONFIG


def test_options_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "none.yaml", "--dry"])
    assert end.value.code == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_a_machine_prints_the_error(capsys, monkeypatch, rank):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    waited = []
    monkeypatch.setattr("megatrain.cli.main.time.sleep", waited.append)
    assert main(["pretrain", "none.yaml"]) == 1
    assert capsys.readouterr().err == (MISSING_CONFIG if rank == 0 else "")
    assert waited == ([] if rank == 0 else [10.0]), (
        "a launcher ends all ranks when the first exits; that one must be the rank that prints"
    )


def test_max_restarts_is_refused_under_a_launcher(capsys, monkeypatch):
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert main(["pretrain", str(CONFIGS / "demo_cpu.yaml"), "run.max_restarts=2"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(
        "error: run.max_restarts=2 requires ranks that megatrain starts itself"
    )
    assert "torchrun --max-restarts" in message


@pytest.mark.parametrize(
    ("script", "extra"),
    [("pretrain", []), ("pretrain", ["--local_rank=1"]), ("finetune", ["--local-rank", "1"])],
)
def test_scripts_accept_arguments_of_launchers_in_any_folder(tmp_path, script, extra):
    command = [sys.executable, str(PACKAGE / f"{script}.py"), *extra, "none.yaml", "train.steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, MISSING_CONFIG)


@pytest.mark.parametrize(
    "words", [["config"], ["schedule", "zb-v", "--ranks", "4", "--microbatches", "8"]]
)
def test_closed_pipe_ends_a_command_silently(words):
    """A shell shows 141 for a command that SIGPIPE ended, as `| head` does."""
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


def test_broken_connection_is_not_a_closed_pipe(monkeypatch):
    def broken(arguments):
        raise BrokenPipeError

    monkeypatch.setattr("megatrain.cli.main._run", broken)
    with pytest.raises(BrokenPipeError):
        main(["config"])


def test_scripts_do_not_shadow_other_modules():
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(PACKAGE)!r})\n"
        f"    sys.argv = ['pretrain.py', 'none.yaml']\n"
        f"    runpy.run_path({str(PACKAGE / 'pretrain.py')!r}, run_name='__main__')\n"
        f"except SystemExit:\n    import importlib.util\n"
        f"    assert importlib.util.find_spec('supervisor') is None\n"
        f"try:\n    pass"
    )
    assert "megatrain.launch.supervisor" in modules_after(code)
