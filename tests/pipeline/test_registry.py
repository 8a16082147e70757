"""From settings to a schedule, and what is refused."""

import pytest

from megatrain.errors import ConfigError
from megatrain.pipeline.registry import choose_schedule
from megatrain.pipeline.schedules import SCHEDULES, make_schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_name(name):
    assert choose_schedule(name, ranks=2, microbatches=4) == make_schedule(name, 2, 4)
    chunks = SCHEDULES[name].chunks
    assert choose_schedule(name, ranks=2, microbatches=4, virtual=chunks) == make_schedule(
        name, 2, 4
    )


def test_virtual_chunks():
    assert choose_schedule("interleaved", ranks=2, microbatches=4, virtual=3).placement.chunks == 3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("1f1", {}, "parallel.schedule=1f1 is not a schedule; did you mean 1f1b?"),
        (
            "x",
            {},
            "parallel.schedule=x is not a schedule; use gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipev, auto or the path of a .csv file",
        ),
        (
            "1f1b",
            {"virtual": 2},
            "parallel.virtual=2 and parallel.schedule=1f1b has one chunk of layers a rank; "
            "use 1, or parallel.schedule=interleaved, or leave parallel.virtual out",
        ),
        (
            "zb-h1",
            {"virtual": 4},
            "parallel.virtual=4 and parallel.schedule=zb-h1 has one chunk of layers a rank; "
            "use 1, or parallel.schedule=interleaved, or leave parallel.virtual out",
        ),
        (
            "interleaved",
            {"virtual": 1},
            "parallel.virtual=1 and parallel.schedule=interleaved needs 2 or more chunks of layers a rank; "
            "use 2, or parallel.schedule=1f1b, or leave parallel.virtual out",
        ),
        (
            "zb-v",
            {"virtual": 3},
            "parallel.virtual=3 and parallel.schedule=zb-v has 2 chunks of layers a rank; "
            "use 2, or leave parallel.virtual out",
        ),
        (
            "dualpipev",
            {"microbatches": 7, "sequences": 6},
            "train.global_batch_size=42 makes 7 microbatches and "
            "parallel.schedule=dualpipev on 4 ranks needs 8 or more; use 48 or more, or another schedule",
        ),
    ],
)
def test_what_is_refused(name, settings, message):
    with pytest.raises(ConfigError) as error:
        choose_schedule(name, **{"ranks": 4, "microbatches": 8, **settings})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ranks": 3},
            "parallel.schedule={} has 2 rows of actions and parallel.pipeline=3 ranks need one each; "
            "use parallel.pipeline=2 or a file of 3 rows",
        ),
        (
            {"virtual": 2},
            "parallel.virtual=2 and parallel.schedule={} has 1 chunk a rank; use 1 or leave parallel.virtual out",
        ),
        (
            {"microbatches": 1, "sequences": 4},
            "train.global_batch_size=4 makes 1 microbatch and parallel.schedule={} is for 2; use 8",
        ),
    ],
)
def test_files_of_other_sizes_are_refused(tmp_path, settings, message):
    path = tmp_path / "mine.CSV"
    path.write_text("F0,F1,B0,B1\nF0,B0,F1,B1\n")
    assert (
        choose_schedule(str(path), ranks=2, microbatches=2).actions
        == make_schedule("1f1b", 2, 2).actions
    )
    with pytest.raises(ConfigError) as error:
        choose_schedule(str(path), **{"ranks": 2, "microbatches": 2, **settings})
    assert str(error.value) == message.format(path)
