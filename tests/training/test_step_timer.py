"""The step timer sums the laps of an executor by kind."""

import torch

from megatrain.pipeline.executor import Executor, no_timing
from megatrain.training import step_timer
from megatrain.training.step_timer import StepTimer

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
"""The laps and the times of their ends."""


def executor():
    return Executor(
        lambda *arguments: None,
        communicator=None,
        hidden_shape=(1,),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_laps_of_the_pipeline_are_summed_by_kind(monkeypatch):
    moments = iter(moment for _, moment in LAPS)
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: next(moments))
    timed = executor()
    timer = StepTimer(timed)
    for ended, _ in LAPS:
        timed.timing(ended)
    timer.stop()
    assert timer.seconds() == {"waiting": 3 + 1 + 0, "forward": 1, "backward": 9 + 50}
    assert timed.timing is no_timing


def test_a_step_without_laps_has_no_times():
    timer = StepTimer(executor())
    timer.stop()
    assert timer.seconds() == {}
