"""Completion scripts complete commands, options and files in a real shell."""

import shutil
import subprocess
import sys

import pytest

from megatrain.cli.main import COMMANDS, main

COMPLETE = """
source {script}
COMP_WORDS=(megatrain {words}) COMP_CWORD={position} COMP_LINE="megatrain {words}"
_shtab_megatrain
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Returns a function that completes the last word of a command line in bash."""
    if shutil.which("bash") is None:
        pytest.skip("requires bash")
    script = tmp_path_factory.mktemp("completion") / "megatrain.bash"
    script.write_bytes(
        subprocess.check_output([sys.executable, "-m", "megatrain", "completion", "bash"])
    )

    def run(words, folder):
        position = words.count(" ") + 1
        code = COMPLETE.format(script=script, words=words, position=position)
        return subprocess.check_output(["bash", "-c", code], text=True, cwd=folder).split()

    return run


def test_commands(complete, tmp_path):
    assert complete("pre", tmp_path) == ["preprocess", "pretrain"]
    assert complete("pro", tmp_path) == ["profile"]


def test_options_and_choices(complete, tmp_path):
    assert complete("convert --no", tmp_path) == ["--no-verify"]
    assert complete("convert --to ch", tmp_path) == ["checkpoint"]


def test_files(complete, tmp_path):
    (tmp_path / "run.yaml").touch()
    assert complete("pretrain ru", tmp_path) == ["run.yaml"]


def test_zsh_names_every_command(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef megatrain")
    assert all(f"_{name.replace('-', '_')}_options" in script for name in COMMANDS)


def test_unsupported_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["completion", "fish"])
    assert end.value.code == 2
    assert "choose from" in capsys.readouterr().err
