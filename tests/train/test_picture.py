"""loss.png is drawn from what the lines hold."""

import json

import pytest

from megatrain.train import picture
from megatrain.train.metrics import FILE_NAME

TRAIN = [{"step": step, "tokens": step * 100, "loss": 5.0 - step} for step in (1, 2, 3)]
VALID = [{"step": 3, "tokens": 300, "valid_loss": 2.1}]


@pytest.mark.parametrize("lines", [TRAIN + VALID, TRAIN, [], [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}]])
def test_a_picture_is_drawn(tmp_path, lines):
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = picture.draw_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_evaluations_are_no_training_points():
    assert picture._points(TRAIN + VALID, "tokens", "loss") == ([100, 200, 300], [4.0, 3.0, 2.0])
    assert picture._points(TRAIN + VALID, "tokens", "valid_loss") == ([300], [2.1])
