"""What a run's events are told as."""

from datetime import UTC, datetime, timedelta

from megatrain.report.chart import Mark
from megatrain.report.event_timeline import read_timeline, rows
from megatrain.telemetry.events import Event

BEGAN = datetime(2026, 11, 24, 12, tzinfo=UTC)


def events(*told):
    """(name, step, fields) a minute apart."""
    return [
        Event(BEGAN + timedelta(minutes=minute), name, step, fields[0] if fields else {})
        for minute, (name, step, *fields) in enumerate(told)
    ]


def test_each_start_but_the_first_is_a_restart_where_it_resumed():
    story = read_timeline(
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
    assert story.restarts == 3
    assert story.marks == [Mark(40, "restart"), Mark(0, "restart"), Mark(60, "restart")], (
        "the second came to no resume"
    )
    assert story.end is None


def test_a_restart_is_marked_where_the_start_before_it_failed():
    story = read_timeline(
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
    assert story.marks == [
        Mark(35, "restart"),
        Mark(41, "restart"),
        Mark(0, "restart"),
        Mark(41, "stall"),
    ]


def test_rollbacks_stalls_and_spikes_are_marked():
    story = read_timeline(events(("start", None), ("spike", 7), ("rollback", 8), ("stall", 9)))
    assert story.marks == [Mark(7, "spike"), Mark(8, "rollback"), Mark(9, "stall")]


def test_how_it_ended():
    assert (
        read_timeline(events(("start", None), ("finish", 9, {"why": "all steps are done"}))).end
        == "finished after step 9: all steps are done"
    )
    assert (
        read_timeline(events(("start", None), ("stop", 4))).end
        == "stopped, to go on later after step 4"
    )
    assert (
        read_timeline(events(("start", None), ("fail", 4, {"error": "UserError: no"}))).end
        == "failed after step 4: UserError: no"
    )
    assert read_timeline(events(("fail", 4), ("start", None))).end is None, "it goes on"
    assert read_timeline([]).end is None


def test_a_run_that_was_killed_or_hung_ended_so_with_its_cause():
    assert (
        read_timeline(
            events(("start", None), ("save", 4), ("fail", 5, {"cause": "rank 1 was killed"}))
        ).end
        == "failed after step 5: rank 1 was killed"
    )
    assert (
        read_timeline(events(("start", None), ("fail", None, {"cause": "rank 1 was killed"}))).end
        == "failed before its first step was done: rank 1 was killed"
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
        "it is started again"
    )


def test_what_was_there_before_a_run_was_begun_afresh_is_not_told_but_a_supervisors_start_is():
    never = {"resume": "never"}
    story = read_timeline(
        events(
            ("start", None, never),
            ("rollback", 9),
            ("start", None, never),
            ("save", 3),
            ("restart", 5),
            ("start", None, never),
        )
    )
    assert [event.event for event in story.events] == ["start", "save", "restart", "start"]
    assert (story.restarts, story.count("rollback")) == (1, 0)


def test_saves_in_a_row_are_one_row_with_their_means():
    told = events(
        *(
            ("save", step, {"path": f"step-{step}", "seconds": float(step)})
            for step in (10, 20, 30, 60)
        ),
        ("stop", 60),
    )
    saves, stop = rows(told)
    assert (saves.event, saves.number, saves.first_step, saves.last_step, saves.words) == (
        "save",
        4,
        10,
        60,
        "path step-60, seconds on average 30",
    )
    assert (stop.event, stop.number, stop.last_step) == ("stop", 1, 60)
    assert [row.number for row in rows(told[:3])] == [1, 1, 1]


def test_fields_are_said_in_words():
    (row,) = rows(
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
    assert row.words == "hosts n0 n1 n2 n3 and 5 more, layout: tensor 2, in a row 3"
