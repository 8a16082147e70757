"""Console lines of a run."""

import pytest

from megatrain.telemetry import console


def test_the_header_and_step_lines():
    text = console.header(
        name="demo",
        model="llama",
        num_parameters=12_345_678,
        layout="tensor 2 x pipeline 2",
        device="cpu",
        dtype="fp32",
        tokens_per_step=8192,
        steps=300,
    )
    assert text.splitlines() == [
        "demo: llama, 12.3M parameters (12,345,678), fp32",
        "  layout  tensor 2 x pipeline 2 on cpu",
        "  work    300 steps x 8,192 tokens = 2.46M tokens",
    ]
    early, late = (
        console.StepLine(1, 300, 8.25, 1.5, 3e-4, 1234.0, 3.3e10, 1.0),
        console.StepLine(200, 300, 2.5, 12.0, 1e-5, 123.0, 3.3e14, 1.0),
    )
    assert console.step_line(early) == (
        "step   1/300  loss  8.2500  grad   1.500  lr 3.00e-04   "
        "1.23k tok/s  33.0 GFLOP/s  4m59s left"
    )
    assert console.step_line(late).index("tok/s") == console.step_line(early).index("tok/s")
    assert console.step_line(late).endswith("330 TFLOP/s  1m40s left")
    assert (
        console.evaluation_line(step=50, steps=300, loss=3.1)
        == "step  50/300  validation loss 3.1000"
    )
    metrics = {
        "valid_rewards/accuracy": 0.75,
        "valid_rewards/margins": 0.5,
        "valid_log_probs/chosen": -9.0,
    }
    assert (
        console.evaluation_line(step=1, steps=2, loss=0.6, measured=metrics)
        == "step 1/2  validation loss 0.6000  rewards/margins 0.5000  rewards/accuracy 0.7500"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (950, "950"),
        (999.9, "1.00k"),
        (1_236_000, "1.24M"),
        (8.03e9, "8.03B"),
        (1e13, "10.0T"),
    ],
)
def test_short_numbers(value, text):
    assert console.short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12, "12s"), (59.6, "1m00s"), (200, "3m20s"), (14700, "4h05m"), (183600, "2d03h")],
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text
