"""The laps of a step are told apart, and nobody else's executor is changed."""

import torch

from megatrain.pipeline.executor import Executor, no_timing
from megatrain.training import step_timer
from megatrain.training.step_timer import timed

LAPS = [
    ("other", 0),
    ("arrival", 3),
    ("F", 4),
    ("other", 10),
    ("arrival", 11),
    ("I", 20),
    ("other", 50),
    ("arrival", 50),
    ("W", 100),
]
"""What ended when."""


def executor():
    return Executor(
        lambda *arguments: None,
        communicator=None,
        hidden_shape=(1,),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_a_lap_is_the_time_before_its_end_and_what_is_not_the_pipelines_is_left_out(monkeypatch):
    moments = iter(moment for _, moment in LAPS)
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: next(moments))
    mine = executor()
    with timed(mine, wanted=True) as watch:
        for ended, _ in LAPS:
            mine.timing(ended)
    assert watch.seconds() == {"waiting": 3 + 1 + 0, "forward": 1, "backward": 9 + 50}
    assert mine.timing is no_timing


def test_unwanted_laps_are_not_taken():
    mine = executor()
    with timed(mine, wanted=False) as watch:
        mine.timing("F")
    assert watch.seconds() == {}
