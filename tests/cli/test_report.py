"""Tests of `megatrain report`: the page shows what the run wrote, and loads nothing."""

import json
import os
import re
from html.parser import HTMLParser

import pytest
import yaml

from megatrain.__main__ import main
from megatrain.report.chart import HEIGHT, WIDTH

STEPS = 60


def loss(step):
    return 5.0 - step / 20


@pytest.fixture
def folder(tmp_path):
    """Folder of a run that was killed after step 30, resumed from 20, skipped a step and finished.

    It has the file, metric and field names of older versions.
    """
    run = tmp_path / "runs" / "a<b>"
    (run / "logs").mkdir(parents=True)
    config = {
        "run": {"name": "a<b> & co"},
        "model": {"model_type": "llama"},
        "task": "sft",
        "train": {"steps": STEPS, "global_batch_size": 8},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    write(
        run / "undone.jsonl",
        *({"step": step, "loss": 9.0, "undone_at": 50} for step in range(41, 51)),
    )
    lines = [metrics_line(step) for step in range(1, STEPS + 1)]
    write(run / "metrics.jsonl", {"step": 0, "valid_loss": 6.0}, *lines)
    write(run / "events.jsonl", *event_lines())
    for rank in range(6):  # two of them of an earlier start on more ranks
        lines = [{"message": "start"}, rank_line(7, rank, seconds=9.0)]
        if rank < 4:
            lines += [{"message": "start"}, *2 * [rank_line(rank // 2, rank, seconds=0.5)]]
        write(run / "logs" / f"rank-{rank:05d}.jsonl", *lines)
    return run


def metrics_line(step):
    line = {
        "step": step,
        "loss": loss(step) if step != 44 else None,
        "grad_norm": 1.0 + step,
        "lr": 1e-3,
        "tokens": 256 * step,
        "seconds": 0.5,
        "tokens_per_second": 512.0,
        "tflops_per_rank": 100.0,
        "mfu": 0.25,
        "skipped": step == 44,
        "memory_gib": 40.0,
        "memory_predicted_gib": 42.0,
        "rewards/accuracy": step / STEPS,
        "valid_f1": 0.5,
    }
    if step % 20 == 0:
        line["valid_loss"] = loss(step) + 1
    if step % 10 == 0:
        line["save_stall_seconds"] = 0.25
    return line


START = {
    "event": "start",
    "step": None,
    "ranks": 4,
    "hosts": ["node1", "node2"],
    "device": "NVIDIA X",
    "resume": "auto",
    "layout": {"tensor": 1, "pipeline": 2, "data": 2, "zero": 1, "schedule": "1f1b"},
    "versions": {"torch": "2.x"},
}


def event_lines():
    save = {"event": "save", "step": 20, "path": "step-20", "seconds": 1.0, "stalled": 0.25}
    skip = {"event": "skip", "step": 44, "what": "non-finite <gradient>", "in_a_row": 1}
    rollback = {"event": "rollback", "step": 50, "to": 40, "first": 1000, "last": 1079}
    lines = [
        {**START, "attempt": 1},
        save,
        {**START, "attempt": 2},
        {"event": "resume", "step": 20, "from": "step-20", "why": "the newest"},
        {**skip, "first": 344, "last": 351},
        rollback,
        {"event": "finish", "step": STEPS, "why": "all steps are done"},
    ]
    return [{"time": at(minute), **line} for minute, line in enumerate(lines)]


def rank_line(pipeline, rank, *, seconds):
    return {
        "message": "figures",
        "pipeline": pipeline,
        "seconds": seconds,
        "forward": 0.1,
        "backward": 0.2,
        "waiting": 0.02 * (rank % 2),
        "peak_memory": 2**30 * (rank + 1),
    }


def at(minute):
    return f"2026-11-24T12:{minute:02d}:00+00:00"


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Parses a page; raises on links to other files, scripts, and tags that are not closed."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.charts = [], "", {}
        self.marks, self.rows, self.titles = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "image", "use")
        assert not {"src", "href", "srcset", "xlink:href", "background", "action"} & set(values)
        assert not any(name.startswith("on") for name in values)
        assert not any(
            word in (value or "")
            for name, value in attributes
            for word in ("//", "url(")
            if name != "xmlns"
        )
        if tag not in self.VOID:
            self.open.append(tag)
        self.collect(tag, values)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def collect(self, tag, values):
        if tag == "svg" and "data-name" in values:
            self.charts[values["data-name"]] = self.chart = {"svg": values, "lines": []}
        elif tag == "path" and "data-line" in values:
            self.chart["lines"].append(values)
        elif tag == "path" and values.get("class", "").startswith("mark"):
            self.marks.append((values["class"].split()[1], values["d"]))
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "style" in self.open:
            assert "url(" not in data
            assert "@import" not in data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "h2" in self.open:
            self.titles.append(data)

    def points(self, chart, shape):
        """Returns the points (step, value) of a chart's first line of the shape."""
        svg = self.charts[chart]["svg"]
        first, last = map(float, svg["data-steps"].split())
        low, high = map(float, svg["data-values"].split())
        assert svg["data-scale"] == "linear"
        path = next(line["d"] for line in self.charts[chart]["lines"] if line["class"] == shape)
        pairs = re.findall(
            rf"M([\d.]+) {HEIGHT}V([\d.]+)" if shape == "stems" else r"[ML]([\d.]+) ([\d.]+)", path
        )
        return [
            (
                round(first + float(x) / WIDTH * (last - first), 1),
                high - float(y) / HEIGHT * (high - low),
            )
            for x, y in pairs
        ]


def page_of(*folders):
    assert main(["report", *map(str, folders)]) == 0
    path = folders[0] / "report.html"
    assert path.stat().st_size < 2e6
    return Page(path.read_text(encoding="utf-8"))


def test_page_has_every_curve_with_its_values(folder, capsys):
    page = page_of(folder)
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    assert not [path for path in folder.iterdir() if path.name.endswith(".new")]
    assert set(page.charts) == {
        "loss",
        "learning rate",
        "gradient norm",
        "throughput",
        "compute",
        "model FLOPs utilisation",
        "highest peak memory of a rank",
        "training blocked by saves",
        "rewards/accuracy",
        "f1",
    }
    known = {
        ("loss", "faint"): {1: loss(1), 30: loss(30), 60: loss(60)},
        ("loss", "dots"): {0: 6.0, 20: loss(20) + 1, 60: loss(60) + 1},
        ("loss", "specks"): {41: 9.0, 50: 9.0},
        ("learning rate", "line"): {1: 1e-3, 60: 1e-3},
        ("gradient norm", "faint"): {1: 2.0, 60: 61.0},
        ("throughput", "faint"): {7: 512.0},
        ("compute", "faint"): {7: 100.0},
        ("model FLOPs utilisation", "faint"): {7: 25.0},
        ("highest peak memory of a rank", "line"): {7: 40.0},
        ("training blocked by saves", "stems"): {10: 0.25, 60: 0.25},
        ("rewards/accuracy", "line"): {30: 0.5},
    }
    for (chart, shape), values in known.items():
        found = dict(page.points(chart, shape))
        for step, value in values.items():
            assert found[step] == pytest.approx(value, rel=0.01), (chart, step)
    assert 44 not in dict(page.points("loss", "faint")), "its loss was not finite"
    assert [line["style"] for line in page.charts["f1"]["lines"]] == ["stroke:var(--c1)"], (
        "the colour of validation"
    )
    assert [
        line["data-line"] for line in page.charts["highest peak memory of a rank"]["lines"]
    ] == ["measured", "predicted"]


def test_restarts_and_rollbacks_are_marked_on_every_chart(folder):
    page = page_of(folder)
    restart, rollback = (f"M{round(WIDTH * step / STEPS)} 0V{HEIGHT}" for step in (20, 50))
    assert page.marks == [("restart", restart), ("rollback", rollback)] * len(page.charts)


def test_page_has_stages_events_skipped_samples_and_config(folder):
    page = page_of(folder)
    stages = [row for row in page.rows if row[-1].endswith(" GiB")]
    assert stages == [
        ["0", "100 ms", "200 ms", "10.0 ms", "190 ms", "500 ms", "2.00 GiB"],
        ["1", "100 ms", "200 ms", "10.0 ms", "190 ms", "500 ms", "4.00 GiB"],
    ]
    assert [row for row in page.rows if len(row) == 4 and " to " in row[2]] == [
        ["50", "rollback", "1,000 to 1,079", "to 40"],
        ["44", "skip", "344 to 351", "non-finite <gradient>, in a row 1"],
    ]
    events = [row[1:3] for row in page.rows if row[0].startswith("2026")]
    assert events == [
        ["finish", "60"],
        ["rollback", "50"],
        ["skip", "44"],
        ["resume", "20"],
        ["start", "–"],
        ["save", "20"],
        ["start", "–"],
    ]
    for text in (
        "a<b> & co",
        "llama · tensor 1 x pipeline 2 x data 2 · 1f1b · ZeRO 1 · "
        "4 ranks on 2 machines, NVIDIA X · torch 2.x",
        "Finished after step 60: all steps are done",
        "cross-entropy loss (nats per token)",
        "global_batch_size: 8",
    ):
        assert text in page.text


def test_killed_run_with_truncated_lines(folder):
    for name in ("metrics.jsonl", "events.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[:-20])
    (folder / "logs" / "rank-00001.jsonl").write_bytes(
        b'{"message": "figures", "forward": 1.0}\n{"message": "fig\xff'
    )
    os.utime(folder / "metrics.jsonl", (0, 1_700_000_000))
    page = page_of(folder)
    assert "Killed or hung: no end was logged; last metrics" in page.text
    assert max(step for step, _ in page.points("loss", "faint")) == STEPS - 1


def test_running_run_and_run_without_steps(folder):
    write(
        folder / "events.jsonl", json.loads((folder / "events.jsonl").read_text().splitlines()[0])
    )
    assert "Running; last metrics" in page_of(folder).text
    (folder / "metrics.jsonl").unlink()
    page = page_of(folder)
    assert "No step has been logged yet." in page.text
    assert page.charts == {}


def test_run_that_hung_or_failed_just_now_is_not_running(folder):
    """Draws marks and rolled-back steps after the last step; explains both CPU memories."""
    start = {**json.loads((folder / "events.jsonl").read_text().splitlines()[0]), "device": "cpu"}
    write(
        folder / "events.jsonl",
        start,
        {"time": at(5), "event": "stall", "step": STEPS + 4, "cause": "nothing has moved"},
    )
    write(folder / "undone.jsonl", {"step": STEPS + 20, "loss": 9.0})
    page = page_of(folder)
    assert f"Hung in step {STEPS + 4}: nothing has moved" in page.text
    assert "Running" not in page.text
    assert page.charts["learning rate"]["svg"]["data-steps"] == f"0 {STEPS + 20}"
    assert page.marks == [
        ("stall", f"M{round(WIDTH * (STEPS + 4) / (STEPS + 20))} 0V{HEIGHT}")
    ] * len(page.charts)
    assert page.points("loss", "specks") == [(STEPS + 20, pytest.approx(9.0, rel=0.01))]
    assert page.text.count("growth of the process's resident memory since") == 1
    assert "peak of the highest rank, the resident memory of its process" in " ".join(
        page.text.split()
    )
    write(
        folder / "events.jsonl",
        start,
        {"time": at(5), "event": "fail", "step": STEPS, "cause": "rank 1 was killed"},
    )
    assert f"Failed after step {STEPS}: rank 1 was killed" in page_of(folder).text


def test_run_without_events(tmp_path):
    write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0})
    page = page_of(tmp_path)
    assert page.points("loss", "line") == [(1, pytest.approx(2.0))]
    assert set(page.charts) == {"loss"}


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ({"task": "dpo"}, "DPO loss (per pair)"),
        (
            {"task": "classification", "classification": {"problem": "regression"}},
            "mean squared error",
        ),
    ],
)
def test_loss_has_the_name_of_its_task(folder, task, name):
    (folder / "config.yaml").write_text(yaml.safe_dump(task))
    page = page_of(folder)
    assert name in page.text
    assert "nats" not in page.text


def test_several_runs_are_compared_in_the_same_charts(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write(
        other / "metrics.jsonl",
        *({"step": step, "loss": 1.0, "lr": 2e-3} for step in range(1, 121)),
    )
    page = page_of(folder, other)
    assert [line["data-line"] for line in page.charts["learning rate"]["lines"]] == [
        "a<b> & co",
        "other",
    ]
    assert {line["style"] for line in page.charts["learning rate"]["lines"]} == {
        "stroke:var(--c0)",
        "stroke:var(--c1)",
    }
    assert page.charts["loss"]["svg"]["data-steps"] == "0 120"
    assert any(row[0] == "other" for row in page.rows)


def test_page_has_timelines_if_steps_were_traced(folder, monkeypatch):
    from megatrain.report import page as page_file
    from megatrain.report import run_folder as reading

    monkeypatch.setattr(reading, "_profile", lambda path: "a profile")
    monkeypatch.setattr(page_file, "timelines", lambda profile: [f"<h2>Measured: {profile}</h2>"])
    assert "Measured: a profile" in page_of(folder).titles
    monkeypatch.setattr(page_file, "timelines", lambda profile: ["x" * 2_000_000])
    assert "their timeline is too large for this page" in page_of(folder).text


def test_errors(tmp_path, folder, capsys):
    for arguments, message in (
        ([tmp_path / "none"], "is not a folder"),
        ([tmp_path], "contains neither"),
        ([folder, "--output", tmp_path / "no" / "page.html"], "cannot be written"),
    ):
        assert main(["report", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.new"))
