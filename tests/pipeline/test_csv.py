"""Schedules in CSV files: there and back, and every mistake named."""

import pytest

from megatrain.errors import ConfigError
from megatrain.pipeline.csv import microbatches_of, read_schedule, write_schedule
from megatrain.pipeline.schedules import SCHEDULES, make_schedule

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
@pytest.mark.parametrize("says", [True, False])
def test_there_and_back(read, name, ranks, says):
    schedule = make_schedule(name, ranks, 8)
    text = write_schedule(schedule)
    again = read(text if says else text[text.startswith("#") and text.index("\n") + 1 :], ranks)
    assert again.actions == schedule.actions
    assert (
        again.placement == schedule.placement
    ) or ranks == 1  # On one rank, a loop and a V of 2 chunks are the same.
    assert again.peaks == schedule.peaks
    assert microbatches_of(again) == 8


def test_as_written():
    assert (
        write_schedule(make_schedule("zb-v", 1, 1)) == "# placement: v\nF0,F0.1,I0.1,W0.1,I0,W0\n"
    )
    assert write_schedule(make_schedule("1f1b", 2, 2)) == TWO


def test_idle_cells_spaces_blank_lines_and_comments(read):
    assert (
        read("\ufeff# mine\n\nF0, F1,,, B0 ,,B1,\n,F0,B0,F1,B1,,\n,,\n").actions
        == make_schedule("1f1b", 2, 2).actions
    )


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            "F0,F1,B0\nF0,B0,F1,B1\n",
            "is not a legal schedule: rank 0 lacks B1 and has nothing too much",
        ),
        (
            "F0,F1,B0,B1\nF0,B0,F1\n",
            "is not a legal schedule: rank 1 lacks B1 and has nothing too much",
        ),
        ("F0,F1,B0,B1\nF0,B0,F1,B1,B1\n", "is not a legal schedule: rank 1 does B1 2 times"),
        ("F0,I0\nF0,B0\n", "is not a legal schedule: rank 0 lacks W0 and has nothing too much"),
        (
            "F0,B0,F1,B1\nF1,F0,B1,B0\n",
            "is not a legal schedule: deadlock: rank 0 waits for ever at B0, rank 1 waits for ever at F1",
        ),
        ("F0,X1\nF0,B0\n", "has `X1` for rank 0 in column 2, which is no action"),
        ("F0,B0\nF0,b0\n", "has `b0` for rank 1 in column 2, which is no action"),
        ("F0,B0\nF0,B\n", "has `B` for rank 1 in column 2, which is no action"),
        ("F0,B0\nF0,B-1\n", "has `B-1` for rank 1 in column 2, which is no action"),
        (
            TWO + "F0,F1,B0,B1\n",
            "has 3 rows of actions and parallel.pipeline=2 ranks need one each",
        ),
        ("", "has 0 rows of actions and parallel.pipeline=2 ranks need one each"),
        ("F0,F2,B0,B2\nF0,B0,F2,B2\n", "has microbatch 2 and no microbatch 1"),
        ("F0,F0.999999999\nF0\n", "has chunk 999999999 and no chunk 1"),
        ("# placement: w\n" + TWO, "says `# placement: w`, which is no placement"),
        # Legal in a V alone, and the file says loop.
        (
            "# placement: loop\n" + write_schedule(make_schedule("zb-v", 2, 4)).split("\n", 1)[1],
            "is not a legal schedule: deadlock",
        ),
    ],
)
def test_mistakes(read, tmp_path, text, rule):
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
