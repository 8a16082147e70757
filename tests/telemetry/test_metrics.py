"""metrics.jsonl has each step once, as valid JSON, after kills, resumes and rollbacks."""

import json
import time

from megatrain.telemetry.metrics import FILE_NAME, MetricsLog, read, rolled_back_path


def steps_of(folder):
    return [line["step"] for line in read(folder / FILE_NAME)]


def write(folder, first, last, *, after_step):
    with MetricsLog(folder, after_step=after_step) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss": 1.0 / step, "phase": "text"})


def test_a_line_is_readable_before_the_file_is_closed(tmp_path):
    log = MetricsLog(tmp_path, after_step=0)
    log.write(1, {"loss": 2.5})
    assert list(read(tmp_path / FILE_NAME)) == [{"step": 1, "loss": 2.5}]
    log.close()


def test_a_resume_drops_the_later_steps_and_keeps_each_once(tmp_path):
    write(tmp_path, 1, 9, after_step=0)
    write(tmp_path, 6, 7, after_step=5)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_start_from_scratch_drops_old_lines(tmp_path):
    write(tmp_path, 1, 3, after_step=0)
    write(tmp_path, 1, 2, after_step=0)
    assert steps_of(tmp_path) == [1, 2]


def test_a_restart_before_the_first_checkpoint_has_step_0_once(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path, after_step=0) as log:
            log.write(0, {"valid_loss": 4.2})
            log.write(1, {"loss": 4.0})
    assert steps_of(tmp_path) == [0, 1]


def test_a_truncated_line_is_dropped(tmp_path):
    write(tmp_path, 1, 3, after_step=0)
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert steps_of(tmp_path) == [1, 2, 3]
    write(tmp_path, 4, 5, after_step=4)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_non_finite_numbers_are_null_in_strict_json(tmp_path):
    with MetricsLog(tmp_path, after_step=0) as log:
        log.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "mfu": None})

    def fail(constant):
        raise AssertionError(constant)

    (line,) = (tmp_path / FILE_NAME).read_text().splitlines()
    assert json.loads(line, parse_constant=fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "mfu": None,
    }


def test_tensorboard_shows_the_resumed_steps_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 1, 4, after_step=0)
    time.sleep(1.1)  # files are read in the order of their names, which hold the second
    write(tmp_path, 3, 5, after_step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert events.Tags()["scalars"] == ["loss"]


def test_a_rollback_moves_the_later_steps_to_a_file(tmp_path):
    with MetricsLog(tmp_path, after_step=0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
        log.roll_back(to_step=1, from_step=3)
        log.write(2, {"loss": 9.0})
    assert steps_of(tmp_path) == [1, 2]
    moved = list(read(rolled_back_path(tmp_path)))
    assert [(line["step"], line["undone_at"]) for line in moved] == [(2, 3), (3, 3)]


def test_rolled_back_metrics_of_older_versions_are_found(tmp_path):
    (tmp_path / "undone.jsonl").write_text('{"step": 2, "loss": 1.0, "undone_at": 3}\n')
    assert [line["step"] for line in read(rolled_back_path(tmp_path))] == [2]
