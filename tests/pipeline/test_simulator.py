"""Simulated times, compared with times computed by hand."""

import pytest

from megatrain.pipeline.schedule import Action, Placement, Schedule
from megatrain.pipeline.schedules import build_schedule
from megatrain.pipeline.simulator import Times, even_times, simulate
from megatrain.pipeline.verify import ScheduleError


def starts(timeline):
    return [
        [(str(span.action), span.start, span.end) for span in spans] for spans in timeline.spans
    ]


def test_messages_between_ranks_take_time():
    times = Times([1, 1], [1, 1], [1, 1], send=0.5)
    made = simulate(build_schedule("1f1b", 2, 2), times)
    assert starts(made) == [
        [("F0", 0, 1), ("F1", 1, 2), ("B0", 5, 7), ("B1", 8, 10)],
        [("F0", 1.5, 2.5), ("B0", 2.5, 4.5), ("F1", 4.5, 5.5), ("B1", 5.5, 7.5)],
    ]
    assert (made.makespan, made.busy, made.peak_activations) == (10, [6, 6], [2, 1])
    assert made.bubble == pytest.approx(1 - 12 / 20)


def test_messages_within_a_rank_take_no_time():
    made = simulate(
        build_schedule("zb-v", 1, 1),
        even_times(Placement(1, 2, "v"), forward=2, input_gradient=2, weight_gradient=2, send=9),
    )
    assert starts(made) == [
        [("F0", 0, 1), ("F0.1", 1, 2), ("I0.1", 2, 3), ("W0.1", 3, 4), ("I0", 4, 5), ("W0", 5, 6)],
    ]
    assert made.bubble == 0


def test_stages_may_differ():
    """Stage 1, on rank 1, is slow; stage 3, the second chunk of rank 0 in the V, is fast."""
    times = Times([1, 4, 1, 0.5], [2, 2, 2, 1], [3, 1, 1, 1])
    made = simulate(build_schedule("zb-v", 2, 1), times)
    assert starts(made) == [
        [
            ("F0", 0, 1),
            ("F0.1", 6, 6.5),
            ("I0.1", 6.5, 7.5),
            ("W0.1", 7.5, 8.5),
            ("I0", 12.5, 14.5),
            ("W0", 14.5, 17.5),
        ],
        [
            ("F0", 1, 5),
            ("F0.1", 5, 6),
            ("I0.1", 7.5, 9.5),
            ("W0.1", 9.5, 10.5),
            ("I0", 10.5, 12.5),
            ("W0", 12.5, 13.5),
        ],
    ]


def test_b_takes_as_long_as_i_and_w():
    times = Times([1], [2], [4])
    assert [times.duration(Action(kind, 0), 0) for kind in "FBIW"] == [1, 6, 2, 4]


def test_chunks_share_a_ranks_time():
    assert even_times(
        Placement(2, 4), forward=1, input_gradient=2, weight_gradient=4, send=3
    ) == Times([0.25] * 8, [0.5] * 8, [1] * 8, 3)


def test_deadlocks_are_errors():
    crossed = [[Action("B", 0), Action("F", 0)], [Action("F", 0), Action("B", 0)]]
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate(Schedule("", Placement(2), crossed, [1, 1]), Times([1, 1], [1, 1], [1, 1]))
