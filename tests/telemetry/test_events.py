"""events.jsonl keeps all events through kills, restarts and several writers."""

import json
import logging
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from megatrain.checkpoint.train_state import TrainState
from megatrain.telemetry.events import FILE_NAME, Event, EventLog, read, write_failure
from megatrain.training.run_logger import RunLogger


def names_of(folder):
    return [event.event for event in read(folder)]


def test_an_event_is_written_at_once_with_time_name_and_step(tmp_path):
    log = EventLog(tmp_path / "run")
    log.write(
        "save",
        step=7,
        path=Path("run/checkpoints/step-00000007"),
        seconds=1.5,
        stalled=float("nan"),
    )
    (line,) = (tmp_path / "run" / FILE_NAME).read_text().splitlines()
    raw = json.loads(line, parse_constant=pytest.fail)
    assert list(raw)[:3] == ["time", "event", "step"]
    (event,) = read(tmp_path / "run")
    assert event == Event(
        event.time,
        "save",
        7,
        {"path": "run/checkpoints/step-00000007", "seconds": 1.5, "stalled": None},
    )
    assert isinstance(event.time.utcoffset(), timedelta)
    log.close()


def test_another_attempt_appends(tmp_path):
    for step in (1, 2):
        with EventLog(tmp_path) as log:
            log.write("start", step=step)
    assert [event.step for event in read(tmp_path)] == [1, 2]


def test_no_folder_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with EventLog(None) as log:
        log.write("start", ranks=4)
    assert not list(tmp_path.iterdir())


WRITE_ENDLESSLY = """
import sys
from pathlib import Path
from megatrain.telemetry.events import EventLog
log = EventLog(Path(sys.argv[1]))
for step in range(10**9):
    log.write("skip", step=step, why="x" * (step % 300))
    if step == 50:
        print("going", flush=True)
"""


def test_lines_before_a_sigkill_are_kept_and_another_attempt_appends(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE_ENDLESSLY, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert writer.stdout.readline() == b"going\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    before = [event.step for event in read(tmp_path)]
    assert before == list(range(len(before)))
    assert len(before) > 50
    with EventLog(tmp_path) as log:
        log.write("start", ranks=2)
    assert names_of(tmp_path)[len(before) :] == ["start"]


def test_a_truncated_line_is_skipped(tmp_path):
    with EventLog(tmp_path) as log:
        log.write("start")
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"time": "2026-11-24T23:31:02+00:00", "event": "sa')
    assert names_of(tmp_path) == ["start"]
    with EventLog(tmp_path) as log:
        log.write("resume", step=3)
        log.write("finish", step=9)
    assert names_of(tmp_path) == ["start", "resume", "finish"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "null",
        "7",
        '{"event": "save"}',
        '{"time": "2026-11-24T23:31:02", "event": "save"}',
        '{"time": "2026-11-24T23:31:02+00:00", "event": "save", "step": "7"}',
        '{"time": 7, "event": "save"}',
    ],
)
def test_invalid_lines_are_skipped(tmp_path, line):
    (tmp_path / FILE_NAME).write_text(line + "\n")
    assert not list(read(tmp_path))


def test_a_missing_file_has_no_events(tmp_path):
    assert not list(read(tmp_path))


def test_write_errors_are_logged_and_ignored(tmp_path, monkeypatch):
    log = EventLog(tmp_path)

    real, warnings = os.write, []
    monkeypatch.setattr(logging.getLogger("megatrain"), "warning", warnings.append)

    def full(descriptor, data):
        if data.startswith(b"{"):
            return real(descriptor, data[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.write("save", step=1)
    log.write("save", step=2)
    assert [event.step for event in read(tmp_path)] == [2]
    assert warnings == ["events.jsonl cannot be written: No space left on device"]
    log.close()


def test_a_rank_writes_its_own_failure_and_no_lost_connection(tmp_path):
    run_logger = object.__new__(RunLogger)
    run_logger.events = EventLog(tmp_path)
    run_logger.log_failure(ValueError("no such thing"), TrainState(3, 0, 0))
    run_logger.log_failure(RuntimeError("Connection reset by peer"), TrainState(4, 0, 0))
    assert [(event.event, event.step, event.fields["error"]) for event in read(tmp_path)] == [
        ("fail", 3, "ValueError: no such thing")
    ]


@pytest.mark.parametrize(
    ("names", "is_user_error", "written"),
    [
        ([], False, 1),
        (["start"], False, 1),
        (["start", "fail"], False, 0),
        (["start", "stall"], False, 0),
        ([], True, 0),
        (["start"], True, 1),
    ],
)
def test_a_failure_that_no_rank_reported_is_written_once(tmp_path, names, is_user_error, written):
    start = datetime.now().astimezone() - timedelta(minutes=1)
    with EventLog(tmp_path) as log:
        for name in names:
            log.write(name)
    before = len(list(read(tmp_path)))
    for _ in range(2):
        write_failure(
            tmp_path, "rank 1 was killed", step=7, since=start, is_user_error=is_user_error
        )
    assert [
        (event.event, event.step, event.fields["cause"]) for event in list(read(tmp_path))[before:]
    ] == [("fail", 7, "rank 1 was killed")] * written
    write_failure(
        tmp_path, "again", step=7, since=datetime.now().astimezone() + timedelta(minutes=1)
    )
    assert next(reversed(list(read(tmp_path)))).fields["cause"] == "again", (
        "events of earlier attempts do not count"
    )
