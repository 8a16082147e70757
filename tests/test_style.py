"""tools/check_style.py finds each kind of fault, and none in this repository."""

import subprocess
import sys

import pytest
from helpers.checkout_paths import ROOT

CHECK = [sys.executable, str(ROOT / "tools" / "check_style.py")]

FAULTS = {
    "a long function": ("def f():\n" + "    x = 1\n" * 61, "`f` has 62 lines"),
    "a long file": ("x = 1\n" * 451, "the file has 451 lines"),
    "an opening": ('"""What it does."""\n', "opens with 'What'"),
    "no verb": ('def f():\n    """The size."""\n', "opens with 'The'"),
    "a long sentence": ('"""Sizes ' + "of it " * 13 + '."""\n', "a sentence of 27 words"),
    "a banned word": ("x = 1  # it tells the rank\n", "the word 'tells'"),
    "a banned word of a message": ('x = "the run goes on"\n', "the word 'goes on'"),
}


def findings(path):
    done = subprocess.run([*CHECK, str(path)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault, tmp_path):
    source, message = FAULTS[fault]
    (tmp_path / "code.py").write_text(source)
    code, output = findings(tmp_path)
    assert code == 1
    assert f"code.py:{1 if 'word' in fault or 'file' in fault else ''}" in output
    assert message in output


def test_accepted_code(tmp_path):
    (tmp_path / "code.py").write_text(
        '"""Sizes of tensors."""\n\n\ndef size():\n    """Returns the size in bytes."""\n'
    )
    assert findings(tmp_path) == (0, "1 files: no findings\n")


def test_repository_has_no_findings():
    done = subprocess.run(CHECK, capture_output=True, text=True, check=False)
    code, output = done.returncode, done.stdout
    assert code == 0, output
