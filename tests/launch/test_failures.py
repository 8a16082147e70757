"""A full disk is no mistake of ours: what fails on it is said in a sentence, and what may be lost is given up."""

import errno
import os
from pathlib import Path

import pytest

from megatrain.errors import UserError
from megatrain.launch.failures import describe_error
from megatrain.telemetry import metrics
from megatrain.telemetry.rank_log import _LogFile


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/config.yaml")


def test_a_full_disk_under_any_file_is_a_sentence():
    with pytest.raises(OSError, match="No space") as raised:
        full()
    report = describe_error(raised.value, 3)
    assert report.kind == "user"
    assert report.text.startswith(
        "rank 3 cannot write to run/config.yaml (No space left on device); checkpoints are as they were: make room"
    )
    assert describe_error(PermissionError(errno.EACCES, "Permission denied"), 3).kind == "error"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_log_gives_up_what_its_disk_does_not_take():
    log = _LogFile(Path("/dev/full").open("ab"), encoding="utf-8", line_buffering=True)  # noqa: SIM115
    print("words", file=log, flush=True)
    log.close()


def test_a_run_does_not_go_on_without_its_metrics(tmp_path, monkeypatch):
    log = metrics.MetricsLog(tmp_path, after_step=0)
    monkeypatch.setattr(metrics.LineFile, "write", full)
    with pytest.raises(
        UserError,
        match=r"metrics\.jsonl or tensorboard/ beside it cannot be written \(No space left on device\)",
    ):
        log.write(1, {"loss": 4.2})
    log.close()
