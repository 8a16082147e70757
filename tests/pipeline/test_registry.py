"""Schedules by name, from files and registered by the user, with the errors and their fixes."""

import dataclasses

import pytest

from megatrain import pipeline
from megatrain.errors import ConfigError
from megatrain.pipeline import registry
from megatrain.pipeline.registry import make_schedule, register_schedule
from megatrain.pipeline.schedules import SCHEDULES, build_schedule, one_f_one_b


@pytest.fixture(autouse=True)
def _no_registered_schedules(monkeypatch):
    """Registrations of one test end with it."""
    monkeypatch.setattr(registry, "_registered", {})


def apply_fix(fix, name, **numbers):
    """Returns the arguments of make_schedule after a fix."""
    sequences = numbers.get("sequences_per_microbatch", 1)
    name = fix.pop("parallel.schedule", name)
    if "parallel.virtual" in fix:
        numbers["virtual_stages"] = fix.pop("parallel.virtual")
    if "parallel.pipeline" in fix:
        numbers["ranks"] = fix.pop("parallel.pipeline")
    if "train.global_batch_size" in fix:
        numbers["microbatches"] = fix.pop("train.global_batch_size") // sequences
    assert not fix
    return name, numbers


@pytest.mark.parametrize("name", SCHEDULES)
def test_builds_schedules_by_name(name):
    expected = build_schedule(name, 2, 4)
    assert make_schedule(name, ranks=2, microbatches=4) == expected
    chunks = SCHEDULES[name].chunks
    assert make_schedule(name, ranks=2, microbatches=4, virtual_stages=chunks) == expected


def test_virtual_stages():
    schedule = make_schedule("interleaved", ranks=2, microbatches=4, virtual_stages=3)
    assert schedule.placement.chunks == 3


@pytest.mark.parametrize(
    ("name", "numbers", "setting", "fix"),
    [
        ("1f1", {}, "parallel.schedule", {"parallel.schedule": "1f1b"}),
        ("x", {}, "parallel.schedule", {"parallel.schedule": "1f1b"}),
        ("1f1b", {"virtual_stages": 2}, "parallel.virtual", {"parallel.virtual": 1}),
        ("zb-h1", {"virtual_stages": 4}, "parallel.virtual", {"parallel.virtual": 1}),
        ("interleaved", {"virtual_stages": 1}, "parallel.virtual", {"parallel.virtual": 2}),
        ("zb-v", {"virtual_stages": 3}, "parallel.virtual", {"parallel.virtual": 2}),
        (
            "dualpipev",
            {"microbatches": 7, "sequences_per_microbatch": 6},
            "train.global_batch_size",
            {"train.global_batch_size": 48},
        ),
    ],
)
def test_unsupported_numbers_are_errors_with_a_fix(name, numbers, setting, fix):
    numbers = {"ranks": 4, "microbatches": 8, **numbers}
    with pytest.raises(ConfigError) as error:
        make_schedule(name, **numbers)
    assert error.value.setting == setting
    assert error.value.fix == fix
    name, numbers = apply_fix(dict(error.value.fix), name, **numbers)
    make_schedule(name, **numbers)


def test_error_messages():
    with pytest.raises(ConfigError) as error:
        make_schedule("1f1b", ranks=4, microbatches=8, virtual_stages=2)
    assert str(error.value) == (
        "parallel.virtual=2 is not supported by parallel.schedule=1f1b (supported: 1); "
        "for more, use parallel.schedule=interleaved"
    )
    with pytest.raises(ConfigError, match="did you mean 1f1b"):
        make_schedule("1f1", ranks=4, microbatches=8)


@pytest.mark.parametrize(
    ("numbers", "setting", "fix"),
    [
        ({"ranks": 3}, "parallel.schedule", {"parallel.pipeline": 2}),
        ({"virtual_stages": 2}, "parallel.virtual", {"parallel.virtual": 1}),
        (
            {"microbatches": 1, "sequences_per_microbatch": 4},
            "train.global_batch_size",
            {"train.global_batch_size": 8},
        ),
    ],
)
def test_files_of_other_sizes_are_errors_with_a_fix(tmp_path, numbers, setting, fix):
    path = tmp_path / "mine.CSV"
    path.write_text("F0,F1,B0,B1\nF0,B0,F1,B1\n")
    schedule = make_schedule(str(path), ranks=2, microbatches=2)
    assert schedule.actions == build_schedule("1f1b", 2, 2).actions
    numbers = {"ranks": 2, "microbatches": 2, **numbers}
    with pytest.raises(ConfigError) as error:
        make_schedule(str(path), **numbers)
    assert (error.value.setting, error.value.fix) == (setting, fix)
    name, numbers = apply_fix(dict(error.value.fix), str(path), **numbers)
    make_schedule(name, **numbers)


# -- registered schedules ------------------------------------------------------------------------


def forwards_first(rank, ranks, microbatches):
    return [f"{kind}{index}" for kind in "FB" for index in range(microbatches)]


def test_a_registered_schedule_is_made_by_name():
    register_schedule("forwards-first", forwards_first)
    schedule = make_schedule("forwards-first", ranks=3, microbatches=5)
    assert schedule == dataclasses.replace(build_schedule("gpipe", 3, 5), name="forwards-first")


def test_a_registered_schedule_returns_actions_or_text():
    register_schedule("mine", lambda rank, ranks, count: one_f_one_b(rank, ranks, count))
    schedule = make_schedule("mine", ranks=3, microbatches=5)
    assert schedule == dataclasses.replace(build_schedule("1f1b", 3, 5), name="mine")


def test_a_registered_schedule_with_virtual_stages():
    def v(rank, ranks, microbatches):
        return ["F0", "F0.1", "I0.1", "W0.1", "I0", "W0"]

    register_schedule("v", v, virtual_stages=2, placement="v", min_microbatches_per_rank=1)
    schedule = make_schedule("v", ranks=1, microbatches=1)
    assert schedule.placement == (1, 2, "v")
    with pytest.raises(ConfigError) as error:
        make_schedule("v", ranks=2, microbatches=1)
    assert error.value.fix == {"train.global_batch_size": 2}
    with pytest.raises(ConfigError) as error:
        make_schedule("v", ranks=1, microbatches=1, virtual_stages=3)
    assert error.value.fix == {"parallel.virtual": 2}


@pytest.mark.parametrize(
    ("actions", "requirement"),
    [
        (["F0"], "is not a legal schedule: rank 0: missing B0"),
        (["B0", "F0"], "is not a legal schedule: rank 0: B0 precedes F0"),
        (["F0", "x"], "has `x`, which is not an action"),
    ],
)
def test_illegal_registered_schedules_name_the_setting(actions, requirement):
    register_schedule("mine", lambda rank, ranks, microbatches: actions)
    with pytest.raises(ConfigError) as error:
        make_schedule("mine", ranks=1, microbatches=1)
    assert (error.value.setting, error.value.value) == ("parallel.schedule", "mine")
    assert error.value.requirement == requirement
    assert error.value.fix == {"parallel.schedule": "1f1b"}


@pytest.mark.parametrize("name", ["1f1b", "auto", "mine.csv"])
def test_reserved_names_cannot_be_registered(name):
    with pytest.raises(ConfigError, match=r"parallel\.schedule=.* cannot be registered"):
        register_schedule(name, forwards_first)
    with pytest.raises(ConfigError, match="must be at least 1"):
        register_schedule("mine", forwards_first, virtual_stages=0)


def test_unknown_names_suggest_registered_schedules():
    register_schedule("forwards-first", forwards_first)
    with pytest.raises(ConfigError, match="did you mean forwards-first"):
        make_schedule("forward-first", ranks=2, microbatches=2)


# -- the public names ----------------------------------------------------------------------------


def test_public_names_have_docstrings_and_are_imported_lazily():
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = pipeline.other
