"""Early stopping, and the choice of the best checkpoint."""

from __future__ import annotations

import pytest

from megatrain.checkpoint import manifest, retention
from megatrain.checkpoint.retention import find_best, select_checkpoint, write_best
from megatrain.errors import CheckpointError, ConfigError
from megatrain.training.early_stopping import EarlyStopping


def judged(metric, values, *, patience=2):
    """Returns for each value until the stop if it is a new best, and the best step."""
    early, new = EarlyStopping(patience=patience, metric=metric, every=1), []
    for step, value in enumerate(values):
        new.append(early.add(step, {metric: value}))
        if early.is_over:
            break
    return new, early.best_step


def test_losses_must_fall_and_scores_must_rise():
    assert judged("valid_loss", [3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 0.1]) == (
        [True, True, False, True, False, False],
        3,
    )
    assert judged("valid_accuracy", [0.5, 0.6, 0.6, 0.5, 0.9]) == ([True, True, False, False], 1)
    assert judged("valid_mse", [2.0, 1.0])[0] == [True, True]
    assert judged("valid_r2", [0.1, -1.0, 0.0])[1] == 0


def test_nan_is_never_best():
    assert judged("valid_loss", [float("nan"), 3.0, float("nan"), float("nan")]) == (
        [False, True, False, False],
        1,
    )


def test_an_unknown_metric_is_refused_with_those_of_the_run():
    early = EarlyStopping(patience=1, metric="valid_f1", every=1)
    with pytest.raises(ConfigError) as error:
        early.add(1, {"valid_loss": 1.0, "valid_accuracy": 0.5, "loss": 1.0})
    assert (error.value.setting, error.value.value) == ("eval.early_stopping_metric", "valid_f1")
    assert error.value.hint == "use one of valid_accuracy, valid_loss"


def test_message():
    early = EarlyStopping(patience=1, metric="valid_loss", every=1)
    early.add(10, {"valid_loss": 1.5})
    early.add(20, {"valid_loss": 1.6})
    assert early.is_over
    assert (
        early.message() == "stopped early: valid_loss has not improved for 1 evaluations; "
        "its best value is 1.5000, after step 10"
    )


def test_best_checkpoint_is_kept(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / "checkpoints" / f".writing-{step}").mkdir(parents=True)
        manifest.commit(
            tmp_path / "checkpoints" / f".writing-{step}",
            tmp_path / "checkpoints" / f"step-{step:08d}",
            [],
        )
    assert find_best(tmp_path) is None
    write_best(tmp_path, step=2, metric="valid_loss", value=1.0)
    retention.delete(
        retention.find_deletable(
            tmp_path / "checkpoints", keep_last=1, keep_every=0, best=find_best(tmp_path)
        )
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    assert find_best(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    write_best(tmp_path, step=9, metric="valid_loss", value=1.0)
    assert find_best(tmp_path) is None, "it is not there"
    (tmp_path / "best_checkpoint.json").write_text("{")
    assert find_best(tmp_path) is None


def test_run_folder_stands_for_its_best_or_newest_complete_checkpoint(tmp_path, capsys):
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text('{"format": 2, "files": []}')
    assert select_checkpoint(tmp_path) == folder
    assert capsys.readouterr().err == ""
    (folder / "manifest.json").unlink()
    assert select_checkpoint(tmp_path).name == "step-00000002"
    newest = f"warning: using {tmp_path / 'checkpoints/step-00000002'}; skipped: "
    assert capsys.readouterr().err == f"{newest}step-00000003 has no manifest.json\n"
    write_best(tmp_path, step=1, metric="valid_loss", value=1.0)
    assert select_checkpoint(tmp_path).name == "step-00000001"
    assert capsys.readouterr().err == "", "the best is what is wanted, whatever came after it"
    (tmp_path / "checkpoints/step-00000001/manifest.json").unlink()
    assert select_checkpoint(tmp_path).name == "step-00000002"
    assert (
        capsys.readouterr().err
        == f"{newest}step-00000001, the run's best, has no manifest.json; step-00000003 has no "
        f"manifest.json\n"
    )
    write_best(tmp_path, step=3, metric="valid_loss", value=1.0)
    assert select_checkpoint(tmp_path).name == "step-00000002"
    assert (
        capsys.readouterr().err == f"{newest}step-00000003, the run's best, has no manifest.json\n"
    )
    (tmp_path / "checkpoints/step-00000002/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="contains no complete checkpoint"):
        select_checkpoint(tmp_path)
