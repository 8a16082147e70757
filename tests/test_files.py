"""Lines are whole or read over, and their file's end can be read alone."""

import errno
import json
import os

import pytest

from megatrain.files import LineFile, read, write_atomically


def write(path, *lines):
    file = LineFile(path)
    for line in lines:
        file.write(line)
    file.close()


def test_what_is_not_finite_is_null_and_every_line_is_strict_json(tmp_path):
    write(
        tmp_path / "new" / "a",
        {"x": [float("inf"), {"y": float("nan")}], "path": tmp_path, "on": True},
    )

    def refuse(word):
        raise AssertionError(word)

    (line,) = (tmp_path / "new" / "a").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "x": [None, {"y": None}],
        "path": str(tmp_path),
        "on": True,
    }


@pytest.mark.parametrize("line", [b'{"n": ', b"7\n", b"\xff\xfe", b"\n\n", b'{"n": 4'])
def test_truncated_lines_and_lines_without_an_object_are_skipped(tmp_path, line):
    path = tmp_path / "a"
    write(path, {"n": 1})
    with path.open("ab") as file:
        file.write(line)
    write(path, {"n": 2}, {"n": 3})
    assert [line["n"] for line in read(path)] == [1, 2, 3]


def test_the_end_alone_begins_with_a_whole_line(tmp_path):
    path = tmp_path / "a"
    write(path, *({"n": n} for n in range(10)))
    size = len(path.read_bytes()) // 10
    for last in range(1, 10 * size + 20):
        assert [line["n"] for line in read(path, last=last)] == list(
            range(10 - min(10, last // size), 10)
        )


def test_no_file_has_no_lines(tmp_path):
    assert not list(read(tmp_path / "a"))


def test_atomic_write_replaces_the_file_and_leaves_no_temporary_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".json"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fail_while_writing():
        with write_atomically(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_while_writing()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def raise_full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", raise_full)
    with pytest.raises(OSError, match="No space left"), write_atomically(tmp_path / "a") as file:
        file.write_text("new")
    assert list(tmp_path.iterdir()) == []
