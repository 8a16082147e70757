"""The public Python API: its names, its documentation, and the examples of docs/python-api.md."""

import inspect
import re
import subprocess
import sys

import pytest
from helpers.checkout_paths import ROOT

import megatrain as mt

PAGE = (ROOT / "docs" / "python-api.md").read_text()
RUN_PAGE = """
import contextlib, io, pathlib, re
page = pathlib.Path({page!r}).read_text()
names = {{}}
for block, expected in re.findall(r"```python\\n(.*?)```\\n\\n```text\\n(.*?)```", page, re.DOTALL):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(block, names)
    shown = output.getvalue()
    assert shown.endswith(expected), f"{{block}}\\nprints\\n{{shown}}\\nnot\\n{{expected}}"
    print("ok")
"""


def test_import_is_light():
    code = (
        "import sys; import megatrain\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'transformers', 'yaml'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
        "own = {name for name in sys.modules if name.startswith('megatrain')}\n"
        "assert own == {'megatrain', 'megatrain.version'}, own"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", mt.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(mt, name)
    assert f"`{name}" in PAGE or f"mt.{name}" in PAGE, "it is missing in docs/python-api.md"
    docstring = inspect.getdoc(value) or ""
    assert docstring
    if inspect.isfunction(value):
        assert "Example" in docstring or ">>>" in docstring or name in ("convert", "evaluate")
        if name not in ("finetune",):
            assert "Args:" in docstring
            assert "Returns:" in docstring or "None" in str(inspect.signature(value))


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = mt.trian


def test_functions_stay_functions_after_the_command_line_was_used():
    from megatrain.cli.main import main

    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert callable(mt.train)
    assert callable(mt.finetune)
    assert callable(mt.evaluate)
    assert callable(mt.convert)


def test_every_name_is_exported_with_its_type():
    stub = inspect.getsource(mt).partition("__all__ =")[0]
    assert [name for name in mt.__all__ if not re.search(rf"\b{name}\b", stub)] == []


def test_examples_of_the_page(tmp_path):
    code = RUN_PAGE.format(page=str(ROOT / "docs" / "python-api.md"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == PAGE.count("```text")


def test_errors_of_local_ranks_are_raised_here(tmp_path):
    config = mt.load_config(
        {
            "run": {"output_dir": str(tmp_path / "run")},
            "model": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2},
            "data": {"train": str(tmp_path / "missing"), "sequence_length": 16},
            "train": {"steps": 1},
            "parallel": {"pipeline": 2},
        }
    )
    with pytest.raises(mt.errors.UserError, match="missing"):
        mt.train(config)
