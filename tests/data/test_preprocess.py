"""Text files to an indexed data set, in one process and in several."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.checkout_paths import TOOLS

from megatrain.cli import preprocess as preprocess_command
from megatrain.data import text_files
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preprocess import PreprocessSpec, make_encoder, preprocess
from megatrain.data.records import TextBlock
from megatrain.data.tokenizer import load_tokenizer
from megatrain.data.worker_processes import map_in_processes
from megatrain.errors import DataError

TEXTS = [
    "the quick brown fox",
    "naïve 你好 🙂",
    "a <|endoftext|> inside",
    " ",
    "lines\n\n\nof  text\t",
]


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_each_document_is_what_transformers_makes_of_it_and_its_end(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "a.jsonl")
    result = preprocess([source], tokenizer=tokenizer_folder, output=tmp_path / "o", workers=1)
    tokenizer = load_tokenizer(tokenizer_folder)
    data = IndexedDataset(tmp_path / "o")
    expected = [
        [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for text in TEXTS
    ]
    assert [data.document(i).tolist() for i in range(data.num_documents)] == expected
    assert (result.documents, result.tokens) == (len(TEXTS), sum(map(len, expected)))
    assert result.bytes == sum(len(text.encode()) for text in TEXTS)


def test_a_tokenizers_own_special_tokens_are_left_out(tmp_path, tokenizer_folder):
    from tokenizers import processors

    tokenizer = load_tokenizer(tokenizer_folder)
    start = ("<|endoftext|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[start]
    )
    tokenizer.save_pretrained(tmp_path / "adds_start")
    assert load_tokenizer(tmp_path / "adds_start")("x").input_ids[0] == tokenizer.eos_token_id
    preprocess(
        [write_jsonl(tmp_path / "a.jsonl")],
        tokenizer=tmp_path / "adds_start",
        output=tmp_path / "o",
        workers=1,
    )
    preprocess(
        [tmp_path / "a.jsonl"], tokenizer=tokenizer_folder, output=tmp_path / "plain", workers=1
    )
    assert contents(tmp_path / "o") == contents(tmp_path / "plain")


def test_several_processes_write_the_same_files(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 500)
    texts = [f"document {i} " * (1 + i * 7919 % 50) for i in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    for workers in (1, 2):
        preprocess(
            [tmp_path], tokenizer=tokenizer_folder, output=tmp_path / f"o{workers}", workers=workers
        )
    assert contents(tmp_path / "o1") == contents(tmp_path / "o2")
    assert IndexedDataset(tmp_path / "o1").num_documents == 600


def test_a_bad_line_stops_and_leaves_nothing(tmp_path, tokenizer_folder):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nbad\n{"no": 1}\n')
    with pytest.raises(
        DataError, match=r"a.jsonl, line 2: not valid JSON; --on-error skip leaves out"
    ):
        preprocess([path], tokenizer=tokenizer_folder, output=tmp_path / "o", workers=1)
    assert list(tmp_path.iterdir()) == [path]


def test_skipped_lines_are_counted_by_reason(tmp_path, tokenizer_folder):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nbad\n\nworse\n{"text": "y"}\n')
    result = preprocess(
        [path], tokenizer=tokenizer_folder, output=tmp_path / "o", workers=1, on_error="skip"
    )
    assert result.documents == 2
    assert result.skipped == {"not valid JSON": 2, "empty line": 1}


def test_no_documents_is_an_error(tmp_path, tokenizer_folder):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"o: there are no documents to write$"):
        preprocess([tmp_path], tokenizer=tokenizer_folder, output=tmp_path / "o", workers=1)
    (tmp_path / "a.jsonl").write_text("bad\n\nbad\n")
    with pytest.raises(
        DataError,
        match="no documents to write; all records were skipped: 2 not valid JSON, 1 empty line",
    ):
        preprocess(
            [tmp_path],
            tokenizer=tokenizer_folder,
            output=tmp_path / "o",
            workers=1,
            on_error="skip",
        )


def test_few_blocks_are_in_flight(tokenizer_folder):
    spec = PreprocessSpec(
        (tokenizer_folder / "tokenizer.json").read_text(), 0, np.dtype(np.uint16), "text"
    )
    drawn = 0

    def blocks():
        nonlocal drawn
        for drawn in range(1, 31):
            yield TextBlock("a", "row", drawn, [b"text"])

    ahead = [
        drawn - done
        for done, _ in enumerate(map_in_processes(blocks(), make_encoder, spec, workers=2), start=1)
    ]
    assert len(ahead) == 30
    assert max(ahead) <= 4


def children_of(process):
    tasks = Path(f"/proc/{process.pid}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="looks for child processes in /proc"
)
def test_a_killed_run_leaves_no_files_and_no_workers(tmp_path, tokenizer_folder):
    source = write_jsonl(
        tmp_path / "a.jsonl", ["some text of a few words " * 4000] * 400
    )  # 40 MB: it will not finish
    arguments = [
        str(source),
        "--tokenizer",
        str(tokenizer_folder),
        "--output",
        str(tmp_path / "o"),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, TOOLS / "preprocess_data.py", *arguments], stderr=subprocess.DEVNULL
    )
    temporary = tmp_path / ".tmp-o.bin"
    wait_until(lambda: temporary.exists() and temporary.stat().st_size)
    children = children_of(process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    wait_until(lambda: not any(map(running, children)))
    assert not Path(f"{tmp_path}/o.bin").exists()
    assert not Path(f"{tmp_path}/o.idx").exists()
    preprocess([write_jsonl(source)], tokenizer=tokenizer_folder, output=tmp_path / "o", workers=1)
    assert not temporary.exists()
    assert IndexedDataset(tmp_path / "o").num_documents == len(TEXTS)


def test_command_prints_what_was_written_skipped_and_ignored(tmp_path, tokenizer_folder, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl").open("a").write("bad\n")
    (folder / "README.md").write_text("about")
    parser = argparse.ArgumentParser()
    preprocess_command.add_arguments(parser)
    arguments = [str(folder), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "o")]
    assert (
        preprocess_command.run(
            parser.parse_args([*arguments, "--workers", "1", "--on-error", "skip"])
        )
        == 0
    )
    first, skipped, ignored = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}/o: 5 documents, ")
    assert skipped == "skipped 1: not valid JSON"
    assert (
        ignored
        == f"ignored 1 files of other formats or links to folders, such as {folder}/README.md"
    )
