"""loss.png, drawn from metrics.jsonl."""

import json
import typing

import pytest

from megatrain.config.loader import Config
from megatrain.config.schema import Problem
from megatrain.telemetry import plots
from megatrain.telemetry.curves import read_curves
from megatrain.telemetry.metrics import FILE_NAME

TRAIN = [{"step": step, "tokens": step * 100, "loss": 5.0 - step} for step in (1, 2, 3)]
VALID = [{"step": 3, "tokens": 300, "valid_loss": 2.1}]


@pytest.mark.parametrize(
    "lines", [TRAIN + VALID, TRAIN, [], [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}]]
)
def test_a_png_is_written(tmp_path, lines):
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = plots.plot_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_training_and_validation_points_are_separate(tmp_path):
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in TRAIN + VALID))
    curves = read_curves(tmp_path / FILE_NAME)
    assert plots._points(curves, "loss") == ([100, 200, 300], [4.0, 3.0, 2.0])
    assert plots._points(curves, "valid_loss") == ([300], [2.1])


def test_the_axis_names_the_loss_of_the_task(tmp_path, monkeypatch):
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in TRAIN))
    labels = []
    monkeypatch.setattr(
        plots, "_label", lambda axes, title, x_label, y_label: labels.append(y_label)
    )
    for task, problem in (
        ("sft", "single-label"),
        ("dpo", "single-label"),
        ("classification", "regression"),
    ):
        plots.plot_loss(tmp_path, loss=plots.loss_name(task, problem))
    assert labels == [
        "cross-entropy loss (nats per token)",
        "DPO loss (per pair)",
        "mean squared error",
    ]


def test_every_task_and_problem_has_a_name():
    hints = typing.get_type_hints(Config)
    assert (
        len(
            {
                plots.loss_name(task, problem)
                for task in typing.get_args(hints["task"])
                for problem in typing.get_args(Problem)
            }
        )
        == 8
    )
