"""Schedules in CSV files: round trips and errors."""

import pytest

from megatrain.errors import ConfigError
from megatrain.pipeline.schedule_csv import read_schedule, write_schedule
from megatrain.pipeline.schedules import SCHEDULES, build_schedule

TWO = "F0,F1,B0,B1\nF0,B0,F1,B1\n"


@pytest.fixture
def read(tmp_path):
    def read(text, ranks=2):
        path = tmp_path / "mine.csv"
        path.write_text(text)
        return read_schedule(str(path), ranks)

    return read


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("with_placement", [True, False])
def test_round_trip(read, name, ranks, with_placement):
    schedule = build_schedule(name, ranks, 8)
    text = write_schedule(schedule)
    again = read(
        text if with_placement else text[text.startswith("#") and text.index("\n") + 1 :], ranks
    )
    assert again.actions == schedule.actions
    assert (
        again.placement == schedule.placement
    ) or ranks == 1  # On one rank, a loop and a V of 2 chunks are the same.
    assert again.peaks == schedule.peaks
    assert again.microbatches == 8


def test_text():
    assert (
        write_schedule(build_schedule("zb-v", 1, 1)) == "# placement: v\nF0,F0.1,I0.1,W0.1,I0,W0\n"
    )
    assert write_schedule(build_schedule("1f1b", 2, 2)) == TWO


def test_idle_cells_spaces_blank_lines_and_comments(read):
    assert (
        read("\ufeff# mine\n\nF0, F1,,, B0 ,,B1,\n,F0,B0,F1,B1,,\n,,\n").actions
        == build_schedule("1f1b", 2, 2).actions
    )


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            "F0,F1,B0\nF0,B0,F1,B1\n",
            "is not a legal schedule: rank 0: missing B1",
        ),
        (
            "F0,F1,B0,B1\nF0,B0,F1\n",
            "is not a legal schedule: rank 1: missing B1",
        ),
        ("F0,F1,B0,B1\nF0,B0,F1,B1,B1\n", "is not a legal schedule: rank 1: B1 occurs 2 times"),
        ("F0,I0\nF0,B0\n", "is not a legal schedule: rank 0: missing W0"),
        (
            "F0,B0,F1,B1\nF1,F0,B1,B0\n",
            "is not a legal schedule: deadlock: rank 0 is blocked on B0, rank 1 is blocked on F1",
        ),
        ("F0,X1\nF0,B0\n", "has `X1` for rank 0 in column 2, which is not an action"),
        ("F0,B0\nF0,b0\n", "has `b0` for rank 1 in column 2, which is not an action"),
        ("F0,B0\nF0,B\n", "has `B` for rank 1 in column 2, which is not an action"),
        ("F0,B0\nF0,B-1\n", "has `B-1` for rank 1 in column 2, which is not an action"),
        (
            TWO + "F0,F1,B0,B1\n",
            "has 3 rows, but parallel.pipeline=2 requires one row per rank",
        ),
        ("", "has 0 rows, but parallel.pipeline=2 requires one row per rank"),
        ("F0,F2,B0,B2\nF0,B0,F2,B2\n", "has microbatch 2, but microbatch 1 is missing"),
        ("F0,F0.999999999\nF0\n", "has chunk 999999999, but chunk 1 is missing"),
        ("# placement: w\n" + TWO, "has `# placement: w`, which is not a placement"),
        # Legal in a V alone, and the file says loop.
        (
            "# placement: loop\n" + write_schedule(build_schedule("zb-v", 2, 4)).split("\n", 1)[1],
            "is not a legal schedule: deadlock",
        ),
    ],
)
def test_errors(read, tmp_path, text, rule):
    with pytest.raises(ConfigError) as error:
        read(text)
    assert (error.value.setting, error.value.value) == (
        "parallel.schedule",
        str(tmp_path / "mine.csv"),
    )
    assert error.value.requirement.startswith(rule)
    assert error.value.hint


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00F0")
    for name, rule in [
        ("none.csv", "No such file"),
        ("bytes.csv", "not UTF-8"),
        ("", "Is a directory"),
    ]:
        with pytest.raises(ConfigError, match=f"cannot be read: .*{rule}"):
            read_schedule(str(tmp_path / name), 2)
