"""Documents in files of every format, and reports of records that are not documents."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatrain.data import text_files
from megatrain.data.records import parse_texts
from megatrain.data.text_files import find_inputs, read_blocks
from megatrain.errors import DataError

TEXTS = ["one", "two\nlines", "naïve 你好"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def read(*paths, field="text"):
    texts, problems = [], []
    for block in read_blocks(find_inputs(paths).files, field=field):
        some, bad = parse_texts(block, field=field)
        texts += some
        problems += map(str, bad)
    return texts, problems


def zst(data):
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.rstrip(b"\n")),
        ("a.json.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zst(LINES)),
        ("frames.jsonl.zst", zst(LINES[:10]) + zst(LINES[10:])),
        ("members.jsonl.gz", gzip.compress(LINES[:10]) + gzip.compress(LINES[10:])),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("windows.jsonl", LINES.replace(b"\n", b"\r\n")),
    ],
)
def test_a_line_is_a_document(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name) == (TEXTS, [])


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document(tmp_path, name):
    text = "first line\n\nlast line\n"
    pack = {"gz": gzip.compress, "zst": zst}.get(name.rsplit(".", 1)[1], bytes)
    (tmp_path / name).write_bytes(pack(text.encode()))
    assert read(tmp_path / name) == ([text], [])


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_a_row_is_a_document(tmp_path, kind):
    table = pa.table({"id": [1, 2, 3], "body": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet", field="body") == (TEXTS, [])


def test_rows_without_a_value_and_wrong_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", None, ""], "n": [1, 2, 3]}), path)
    assert read(path) == (
        ["x"],
        [f'{path}, row 2: column "text" is null', f"{path}, row 3: empty text"],
    )
    with pytest.raises(DataError, match='has no column "body"; it has text, n'):
        read(path, field="body")
    with pytest.raises(DataError, match='column "n" must contain strings; it contains int64'):
        read(path, field="n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not valid JSON"),
        (b'["text"]', "not a JSON object"),
        (b'{"body": "x"}', 'no field "text"'),
        (b'{"text": null}', 'field "text" is not a string'),
        (b'{"text": 3}', 'field "text" is not a string'),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (rb'{"text": "\ud800"}', 'field "text" contains an unpaired surrogate'),
        (b'{"text": ""}', "empty text"),
        (b"", "empty line"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_kept(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' + line + b'\n{"text": "y"}\n')
    assert read(path) == (["x", "y"], [f"{path}, line 2: {reason}"])


def test_line_numbers_hold_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 40)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "xxxxxxxx"}\n' * 9 + b"bad\n" + b'{"text": "y"}\n')
    texts, problems = read(path)
    assert (len(texts), problems) == (10, [f"{path}, line 10: not valid JSON"])


def test_a_document_too_long_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 30)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 16)
    long = "x" * 100
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "{long}"}}\n{{"text": "b"}}\n')
    (tmp_path / "b.txt").write_text(long)
    pq.write_table(pa.table({"text": ["c", long]}), tmp_path / "c.parquet")
    texts, problems = read(tmp_path)
    assert texts == ["a", "b", "c"]
    assert [problem.split(str(tmp_path))[1].split(": longer")[0] for problem in problems] == [
        "/a.jsonl, line 2",
        "/b.txt",
        "/c.parquet, row 2",
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_compressed_file_is_refused(tmp_path, name):
    data = b"".join(json.dumps({"text": f"{i * i}"}).encode() + b"\n" for i in range(20000))
    (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else zst)(data)[:-500])
    with pytest.raises(DataError, match=f"{name} cannot be read to its end"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.parquet"])
def test_compressed_file_of_zero_bytes_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"{name} cannot be read to its end"):
        read(tmp_path / name)


def test_an_empty_file_among_others(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "c.jsonl").write_bytes(LINES)
    assert read(tmp_path) == (TEXTS, [])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_of_something_else_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text, and not what the name says" * 10)
    with pytest.raises(DataError, match=f"{name} cannot be read to its end"):
        read(tmp_path / name)


def test_folders_and_globs_are_read_in_order(tmp_path):
    for name in ["b.txt", "a.txt", "sub/c.txt", "README.md", ".hidden.txt", "_SUCCESS"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_inputs([tmp_path])
    assert [path.name for path in found.files] == ["a.txt", "b.txt", "c.txt"]
    assert [path.name for path in found.ignored] == ["README.md"]
    assert [path.name for path in find_inputs([str(tmp_path / "*.txt")]).files] == [
        "a.txt",
        "b.txt",
    ]
    assert [path.name for path in find_inputs([tmp_path / "b.txt", tmp_path / "a.txt"]).files] == [
        "b.txt",
        "a.txt",
    ]


def test_links_in_folders(tmp_path):
    """Links to folders are ignored and reported; links to missing files are an error."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    (tmp_path / "in" / "more").symlink_to(tmp_path)
    found = find_inputs([tmp_path / "in"])
    assert [[path.name for path in paths] for paths in found] == [["a.txt"], ["more"]]
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"b.jsonl cannot be read to its end: .*No such file"):
        read(tmp_path / "in")


def test_invalid_inputs_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(DataError, match=r"none\*.txt matches no file"):
        find_inputs([str(tmp_path / "none*.txt")])
    with pytest.raises(
        DataError, match=r"a.doc has a format that is not supported .supported: .jsonl"
    ):
        find_inputs([tmp_path / "a.doc"])
    with pytest.raises(DataError, match=r"a.txt is named twice"):
        find_inputs([tmp_path / "a.txt", tmp_path])


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write((b'{"text": "' + b"word " * 200 + b'"}\n') * 1024)  # 1 MB
    tracemalloc.start()
    size = sum(
        len(record) for block in read_blocks([path], field="text") for record in block.records
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 64e6
    assert peak < 8e6
