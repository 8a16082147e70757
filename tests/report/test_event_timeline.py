"""Tests of a run's timeline, read from its events."""

from datetime import UTC, datetime, timedelta

from megatrain.report.chart import Mark
from megatrain.report.event_timeline import fold_events, read_timeline
from megatrain.telemetry.events import Event

START = datetime(2026, 11, 24, 12, tzinfo=UTC)


def events(*described):
    """Returns events, a minute apart, from (name, step, fields)."""
    return [
        Event(START + timedelta(minutes=minute), name, step, fields[0] if fields else {})
        for minute, (name, step, *fields) in enumerate(described)
    ]


def test_restart_is_marked_at_the_resumed_step():
    timeline = read_timeline(
        events(
            ("start", None),
            ("save", 40),
            ("start", None),
            ("resume", 40),
            ("start", None),
            ("save", 60),
            ("start", None),
            ("resume", 60),
        )
    )
    assert timeline.restarts == 3
    assert timeline.marks == [Mark(40, "restart"), Mark(0, "restart"), Mark(60, "restart")], (
        "the second start did not resume"
    )
    assert timeline.end is None


def test_restart_is_marked_at_the_failed_step():
    timeline = read_timeline(
        events(
            ("start", None),
            ("save", 30),
            ("restart", 35),
            ("start", None),
            ("resume", 30),
            ("stall", 41),
            ("start", None),
            ("resume", 40),
            ("fail", None),
            ("start", None),
        )
    )
    assert timeline.marks == [
        Mark(35, "restart"),
        Mark(41, "restart"),
        Mark(0, "restart"),
        Mark(41, "stall"),
    ]


def test_rollbacks_stalls_and_spikes_are_marked():
    timeline = read_timeline(events(("start", None), ("spike", 7), ("rollback", 8), ("stall", 9)))
    assert timeline.marks == [Mark(7, "spike"), Mark(8, "rollback"), Mark(9, "stall")]


def test_end_of_a_run():
    assert (
        read_timeline(events(("start", None), ("finish", 9, {"why": "all steps are done"}))).end
        == "finished after step 9: all steps are done"
    )
    assert (
        read_timeline(events(("start", None), ("stop", 4))).end
        == "stopped (resumable) after step 4"
    )
    assert (
        read_timeline(events(("start", None), ("fail", 4, {"error": "UserError: no"}))).end
        == "failed after step 4: UserError: no"
    )
    assert read_timeline(events(("fail", 4), ("start", None))).end is None, "it is running"
    assert read_timeline([]).end is None


def test_end_of_a_killed_or_hung_run_has_its_cause():
    assert (
        read_timeline(
            events(("start", None), ("save", 4), ("fail", 5, {"cause": "rank 1 was killed"}))
        ).end
        == "failed after step 5: rank 1 was killed"
    )
    assert (
        read_timeline(events(("start", None), ("fail", None, {"cause": "rank 1 was killed"}))).end
        == "failed before the first step was complete: rank 1 was killed"
    )
    stall = ("stall", 35, {"cause": "nothing has moved\n  rank 0: step 35"})
    assert read_timeline(events(("start", None), stall)).end == "hung in step 35: nothing has moved"
    given_up = read_timeline(
        events(
            ("start", None),
            stall,
            (
                "fail",
                34,
                {"cause": "nothing has moved\n  rank 0", "reason": "step 35 failed twice"},
            ),
        )
    )
    assert (
        given_up.end
        == "failed after step 34: nothing has moved; not restarted: step 35 failed twice"
    )
    assert read_timeline(events(("start", None), stall, ("restart", 34))).end is None, (
        "it is restarted"
    )


def test_events_of_replaced_runs_are_dropped_but_not_those_before_a_supervisors_restart():
    never = {"resume": "never"}
    timeline = read_timeline(
        events(
            ("start", None, never),
            ("rollback", 9),
            ("start", None, never),
            ("save", 3),
            ("restart", 5),
            ("start", None, never),
        )
    )
    assert [event.event for event in timeline.events] == ["start", "save", "restart", "start"]
    assert (timeline.restarts, timeline.count("rollback")) == (1, 0)


def test_consecutive_saves_are_one_row_with_means():
    given = events(
        *(
            ("save", step, {"path": f"step-{step}", "seconds": float(step)})
            for step in (10, 20, 30, 60)
        ),
        ("stop", 60),
    )
    saves, stop = fold_events(given)
    assert (
        saves.event,
        saves.num_events,
        saves.first_step,
        saves.last_step,
        saves.description,
    ) == (
        "save",
        4,
        10,
        60,
        "path step-60, mean seconds 30",
    )
    assert (stop.event, stop.num_events, stop.last_step) == ("stop", 1, 60)
    assert [row.num_events for row in fold_events(given[:3])] == [1, 1, 1]


def test_fields_are_formatted():
    (row,) = fold_events(
        events(
            (
                "start",
                None,
                {
                    "hosts": [f"n{n}" for n in range(9)],
                    "layout": {"tensor": 2},
                    "in_a_row": 3,
                    "nothing": None,
                },
            )
        )
    )
    assert row.description == "hosts n0 n1 n2 n3 and 5 more, layout: tensor 2, in a row 3"


def test_old_field_names_are_renamed():
    (event,) = read_timeline(events(("save", 4, {"stalled": 0.5, "why": "x"}))).events
    assert event.fields == {"blocking_seconds": 0.5, "reason": "x"}
