"""Reports of failures, and the advice for resuming a run after one."""

import errno
import os
from pathlib import Path

import pytest

from megatrain.checkpoint import manifest
from megatrain.config import loader
from megatrain.errors import ConfigError, UserError
from megatrain.launch.failures import FailureReport, RankExit, recovery_hint, report_of, summarize
from megatrain.telemetry import metrics
from megatrain.telemetry.rank_log import _LogFile

KILLED = RankExit(1, -9, 0.0)


def write_to_full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/config.yaml")


def test_full_disk_is_a_user_error():
    with pytest.raises(OSError, match="No space") as raised:
        write_to_full_disk()
    report = report_of(raised.value, 3)
    assert report.kind == "user"
    assert report.text.startswith(
        "rank 3 cannot write to run/config.yaml (No space left on device); "
        "existing checkpoints are intact: free disk space"
    )
    assert report_of(PermissionError(errno.EACCES, "Permission denied"), 3).kind == "error"


def test_report_of_a_user_error_has_its_fix():
    error = ConfigError("train.dtype", "fp8", "is not supported", fix={"train.dtype": "bf16"})
    report = report_of(error, 0)
    assert report.text == "train.dtype=fp8 is not supported\n  fix: train.dtype=bf16"
    assert summarize(report) == "train.dtype=fp8 is not supported"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="requires /dev/full of Linux")
def test_log_ignores_a_full_disk():
    log = _LogFile(Path("/dev/full").open("ab"), encoding="utf-8", line_buffering=True)  # noqa: SIM115
    print("text", file=log, flush=True)
    log.close()


def test_run_stops_if_metrics_cannot_be_written(tmp_path, monkeypatch):
    log = metrics.MetricsLog(tmp_path, after_step=0)
    monkeypatch.setattr(metrics.LineFile, "write", write_to_full_disk)
    with pytest.raises(UserError, match=r"metrics\.jsonl.*\(No space left on device\)"):
        log.write(1, {"loss": 4.2})
    log.close()


@pytest.fixture
def config(tmp_path):
    """Returns a config with overrides, and writes complete and incomplete checkpoints."""

    def create(*overrides, saved=(), incomplete=None):
        checkpoints = tmp_path / "checkpoints"
        for step in saved:
            temporary = checkpoints / f".tmp-{step}"
            temporary.mkdir(parents=True)
            (temporary / "x").write_text("x")
            record = manifest.make_record(temporary, temporary / "x")
            manifest.commit(temporary, checkpoints / f"step-{step:08d}", [record])
        if incomplete is not None:
            (checkpoints / f"step-{incomplete:08d}").mkdir(parents=True)
        return loader.load(None, ["train.steps=90", f"run.output_dir={tmp_path}", *overrides])

    return create


def test_hint_to_resume(config):
    resume = "re-run the same command to resume from step 40"
    assert recovery_hint(config(saved=(20, 40), incomplete=60), KILLED, step=73) == resume
    assert recovery_hint(config(), KILLED, step=None) == resume, "a run that had not started"


def test_hint_if_the_command_does_not_resume(config):
    hint = recovery_hint(config("checkpoint.resume=never", saved=(40,)), KILLED, step=73)
    assert hint == (
        "re-run the same command to start from scratch (checkpoint.resume=never); "
        "with checkpoint.resume=auto it resumes from step 40"
    )
    hint = recovery_hint(config("checkpoint.resume=start"), KILLED, step=73)
    assert hint.startswith("re-run the same command to start again from start (checkpoint.resume=")


def test_hint_names_lost_steps(config):
    restart = "re-run the same command to start from scratch"
    lost = f"; the completed steps are lost; {restart}"
    assert recovery_hint(config(), KILLED, step=73) == (
        "there is no complete checkpoint (checkpoint.save_every=0 saves only at the end)" + lost
    )
    saving = config("checkpoint.save_every=80", incomplete=80)
    assert recovery_hint(saving, KILLED, step=83) == (
        "there is no complete checkpoint (checkpoint.save_every=80)" + lost
    )
    for step in (0, 1):
        assert recovery_hint(config(), KILLED, step=step) == f"no step was completed; {restart}"


def test_no_hint_after_user_errors_and_evaluations(config):
    user = FailureReport(0, "user", "there is no file x.bin", 0.0)
    assert recovery_hint(config(saved=(40,)), user, step=0) == ""
    assert recovery_hint(config("train.steps=0"), KILLED, step=0) == ""
    error = FailureReport(0, "error", "Traceback", 0.0)
    assert recovery_hint(config(), error, step=41) != ""
