"""Profiles of synthetic traces with known results, advice, page, and errors."""

import itertools
import json
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from megatrain.__main__ import main
from megatrain.pipeline.partition import blocks_per_stage
from megatrain.pipeline.schedules import SCHEDULES, build_schedule
from megatrain.pipeline.simulator import Times, simulate
from megatrain.planner.cost_model import best_cut, cost_model, cut_of, rank_slowness
from megatrain.report.bottlenecks import advise
from megatrain.report.chrome_trace import chrome_trace
from megatrain.report.timeline_page import numbers, render_timeline_page
from megatrain.telemetry.bubble_analysis import (
    break_down_waiting,
    message_times,
    profile_pipeline,
)
from megatrain.telemetry.trace_format import (
    RankTrace,
    StepTrace,
    TracedAction,
    read_traces,
    write_trace,
)


def titles(counts):
    """Returns the titles of each stage's layers for the given numbers of blocks."""
    blocks = iter(range(sum(counts)))
    stages = [[f"block {next(blocks)}" for _ in range(count)] for count in counts]
    return (
        [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "head"]]
        if len(stages) > 1
        else [["embedding", *stages[0], "head"]]
    )


def traced(
    schedule, times, *, counts=None, layers=None, step=1, data=0, replicas=1, run=1.0, memory=()
):
    """Returns the traces of a step that runs as simulated, starting at 50 s of the ranks' clocks.

    `layers(kind, layer)` are the seconds of a layer; None leaves them out.
    """
    placement = schedule.placement
    stages = titles(counts or [1] * placement.stages)
    firsts = list(itertools.accumulate([0, *map(len, stages)]))
    timeline = simulate(schedule, times)
    traces = []
    for rank, spans in enumerate(timeline.spans):
        actions, free = [], 0.0
        for span in spans:
            stage = placement.stage(rank, span.action.chunk)
            known = (
                range(firsts[stage], firsts[stage + 1])
                if layers and span.action.kind != "W"
                else ()
            )
            inside = {layer: layers(span.action.kind, layer) for layer in known}
            actions.append(
                TracedAction(span.action, 50 + free, 50 + span.start, 50 + span.end, inside)
            )
            free = span.end
        traces.append(
            RankTrace(
                run=run,
                step=step,
                rank=data * placement.ranks + rank,
                world_size=replicas * placement.ranks,
                pipeline=rank,
                data=data,
                tensor=0,
                schedule=schedule.name,
                placement=placement,
                stages=stages,
                seconds=timeline.makespan * 1.25,
                peak_memory=memory[rank] if memory else 2**30,
                memory="resident memory",
                clock_error=0.0,
                config={"run": {"output_dir": "runs/a<b>", "name": ""}},
                actions=actions,
            )
        )
    return traces


def stage_times(counts, layers, *, slowness=(), beside=0.0, send=0.0):
    """Returns stage times: sums of layer times, scaled by `slowness`, plus `beside` per action."""
    cut = cut_of(tuple(counts))

    def sums(kind):
        return [
            beside
            + (slowness[stage] if slowness else 1)
            * sum(layers(kind, layer) for layer in cut[stage])
            for stage in range(len(cut))
        ]

    return Times(sums("F"), sums("I"), sums("W"), send)


# -- breakdown of a step -------------------------------------------------------------------------


def test_even_stages_wait_for_their_neighbours_alone():
    """1F1B waits (ranks - 1) x (forward + backward)."""
    splits = break_down_waiting(
        traced(build_schedule("1f1b", 4, 8), Times([1] * 4, [1] * 4, [1] * 4))
    )
    assert [tuple(split) for split in splits] == [pytest.approx((24, 9, 0, 0, 0))] * 4


def test_a_slow_stage_is_imbalance():
    """Stage 1 takes twice as long: 1 + 4 x 6 + 2; even stages of 4.5 would take (4 + 1) x 4.5."""
    splits = break_down_waiting(traced(build_schedule("1f1b", 2, 4), Times([1, 2], [1, 2], [1, 2])))
    assert tuple(splits[0]) == pytest.approx((12, 4.5, 10.5, 0, 0))
    assert tuple(splits[1]) == pytest.approx((24, 4.5, -1.5, 0, 0))
    assert [split.span for split in splits] == pytest.approx([27, 27])


def test_a_slow_link_is_communication():
    """(2 + 1) x 3 without messages, and 10 with these, as the simulator's test works out."""
    pipeline = traced(build_schedule("1f1b", 2, 2), Times([1, 1], [1, 1], [1, 1], send=0.5))
    assert [tuple(split) for split in break_down_waiting(pipeline)] == [
        pytest.approx((6, 3, 0, 0, 1))
    ] * 2
    assert message_times(pipeline) == pytest.approx([0.5, 0.5, 0.5])


def test_an_uneven_microbatch_is_neither():
    """Both stages take 2 on average; stage 0 takes 5 for the first microbatch."""

    class Uneven(Times):
        def duration(self, action, stage):
            if action.kind == "F" and stage == 0:
                return 5.0 if action.microbatch == 0 else 1.0
            return super().duration(action, stage)

    splits = break_down_waiting(
        traced(build_schedule("gpipe", 2, 4), Uneven([2, 2], [1, 1], [0, 0]))
    )
    assert [tuple(split) for split in splits] == [pytest.approx((12, 3, 0, 3, 0))] * 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_parts_add_up_to_the_waiting(name):
    numbers_of = random.Random(name)
    schedule = build_schedule(name, 3, 7)
    times = Times(
        *([numbers_of.uniform(0.5, 2) for _ in range(schedule.placement.stages)] for _ in range(3)),
        send=0.3,
    )
    timeline = simulate(schedule, times)
    for rank, split in enumerate(break_down_waiting(traced(schedule, times))):
        assert split.compute == pytest.approx(timeline.busy[rank])
        assert split.waiting == pytest.approx(timeline.makespan - timeline.busy[rank])
        assert split.communication > 0
        assert split.microbatches == pytest.approx(0)


def test_replicas_and_steps_are_averaged():
    schedule = build_schedule("1f1b", 2, 4)
    fast, slow = Times([1, 1], [1, 1], [1, 1]), Times([3, 3], [3, 3], [3, 3])
    steps = [
        StepTrace(
            step,
            [
                *traced(schedule, fast, step=step, replicas=2, memory=(5, 6)),
                *traced(schedule, slow, step=step, data=1, replicas=2, memory=(8, 2)),
            ],
        )
        for step in (20, 21)
    ]
    profile = profile_pipeline(steps)
    assert (profile.steps, profile.replicas, profile.tensor, profile.peak_memory) == (
        [20, 21],
        2,
        1,
        [8, 6],
    )
    assert [tuple(split) for split in profile.breakdowns] == [pytest.approx((24, 6, 0, 0, 0))] * 2
    assert profile.timeline.pipeline[0].data == 1, "the slowest pipeline is shown"


# -- advice --------------------------------------------------------------------------------------


def block_times(**slow):
    """Returns layer times: 1 per kind and block, or those named as `block_4=3.0`."""

    def of(kind, layer):
        if layer == 0:
            return 0.25 if kind == "F" else 0.0
        return slow.get(f"block_{layer - 1}", 1.0)

    return of


def profile_of(name, ranks, microbatches, counts, layers, **more):
    """Returns the profile of a step with the given layer times, scaled on slow stages."""
    schedule = build_schedule(name, ranks, microbatches)
    slow = {
        layer: slowness
        for cut, slowness in zip(cut_of(tuple(counts)), more.get("slowness", []), strict=False)
        for layer in cut
    }

    def measured(kind, layer):
        seconds = layers("I", layer) + layers("W", layer) if kind == "B" else layers(kind, layer)
        return seconds * slow.get(layer, 1.0)

    return profile_pipeline(
        [
            StepTrace(
                1,
                traced(
                    schedule, stage_times(counts, layers, **more), counts=counts, layers=measured
                ),
            )
        ]
    )


def test_a_slow_layer_is_named_and_the_cut_around_it():
    """A head of a quarter block: stages take 9.25 and 15.75 a microbatch, then 12.25 and 12.75."""
    profile = profile_of("1f1b", 2, 8, [3, 3], block_times(block_4=3.0, block_6=0.25))
    advice = advise(profile)[0]
    assert advice.layers_per_stage == [4, 2]
    assert advice.text.startswith(
        "stage 1 is 26% slower than the mean of the stages "
        "(block 4 alone takes 3.0 times the median block): move block 3 from stage 1 to stage 0 → predicted −"
    )
    assert "set parallel.layers_per_stage=[4, 2]" in advice.text
    before = simulate(
        build_schedule("1f1b", 2, 8), stage_times([3, 3], block_times(block_4=3.0, block_6=0.25))
    ).makespan
    after = simulate(
        build_schedule("1f1b", 2, 8), stage_times([4, 2], block_times(block_4=3.0, block_6=0.25))
    ).makespan
    assert advice.gain == pytest.approx((before - after) / (1.25 * before))


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "zb-v"])
@pytest.mark.parametrize("seed", range(3))
def test_no_cut_is_faster_than_the_one_advised(name, seed, monkeypatch):
    """Compares with all cuts of 8 blocks, simulated from the true times."""
    numbers_of = random.Random(f"{name} {seed}")
    times = [numbers_of.choice([1, 1, 1, 2, 4]) * numbers_of.uniform(0.95, 1.05) for _ in range(10)]

    def layers(kind, layer):
        return 0.0 if layer == 0 and kind != "F" else times[layer] * (0.1 if layer == 0 else 1.0)

    schedule = build_schedule(name, 2, 6)
    stages = schedule.placement.stages
    start = [8 // stages] * stages
    measured = profile_of(name, 2, 6, start, layers, beside=0.2, send=0.05).measured
    monkeypatch.setattr(
        "megatrain.planner.cost_model.rank_slowness", lambda measured: [1.0, 1.0]
    )  # of blocks that differ it knows nothing
    model = cost_model(measured)
    assert model.makespan(measured.cut) == pytest.approx(
        simulate(schedule, stage_times(start, layers, beside=0.2, send=0.05)).makespan
    )
    every = [c for c in itertools.product(range(1, 9), repeat=stages) if sum(c) == 8]
    truth = {
        counts: simulate(schedule, stage_times(counts, layers, beside=0.2, send=0.05)).makespan
        for counts in every
    }
    found = tuple(blocks_per_stage(best_cut(model)))
    assert truth[found] <= 1.01 * min(truth.values())


def test_a_slow_rank_is_not_its_layers_fault():
    """Rank 1 takes 1.5 times as long for the same: blocks that leave it become fast."""
    layers = block_times(block_8=0.01)
    profile = profile_of("1f1b", 2, 8, [4, 4], layers, slowness=[1.0, 1.5])
    slow, fast = rank_slowness(profile.measured)[::-1]
    assert slow / fast == pytest.approx(1.5)
    advice = advise(profile)
    assert advice[0].layers_per_stage == [5, 3]
    assert "block 4 alone" not in advice[0].text
    before = simulate(
        build_schedule("1f1b", 2, 8), stage_times([4, 4], layers, slowness=[1.0, 1.5])
    ).makespan
    after = simulate(
        build_schedule("1f1b", 2, 8), stage_times([5, 3], layers, slowness=[1.0, 1.5])
    ).makespan
    assert advice[0].gain == pytest.approx((before - after) / (1.25 * before), rel=0.02)
    assert any(
        item.text.startswith("pipeline rank 1 takes 1.20 times as long as the others")
        for item in advice
    )


def test_an_even_pipeline_has_no_bottleneck():
    layers = block_times(block_32=0.25)
    advice = advise(profile_of("1f1b", 2, 64, [16, 16], layers))
    assert [item.text for item in advice] == [
        "no bottleneck: each part of the waiting is below 10%"
    ]


def test_advice_on_the_schedules_bubble_and_on_messages():
    profile = profile_of("1f1b", 4, 4, [2, 2, 2, 2], block_times(block_8=0.01), send=4.0)
    texts = [item.text for item in advise(profile)]
    assert any(
        re.match(r"\d\d% of the ranks' time is the schedule's own bubble", text) for text in texts
    )
    assert any(
        re.match(r"\d\d% of the ranks' time goes to messages .* takes 4e\+03 ms;", text)
        for text in texts
    )


def test_one_rank_has_no_advice_on_its_cut():
    profile = profile_of("1f1b", 1, 4, [4], block_times())
    assert all(item.layers_per_stage is None for item in advise(profile))
    assert [tuple(split)[1:] for split in profile.breakdowns] == [
        pytest.approx((0, 0, 0, 0), abs=1e-9)
    ]


# -- page and trace ------------------------------------------------------------------------------


class Page(HTMLParser):
    """The open tags and the texts of a page."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        assert not any(name in ("src", "href") for name, _ in attributes), (
            "the page is self-contained"
        )
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_page_has_both_timelines_at_one_scale(name):
    schedule = build_schedule(name, 2, 5)
    counts = [2] * schedule.placement.stages
    profile = profile_of(name, 2, 5, counts, block_times(), send=0.5)
    text = render_timeline_page(profile, advise(profile))
    page = Page(text)
    assert page.open == []
    assert "Profile of runs/a<b>" in page.texts
    measured, ideal = (
        ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    )
    space = "{http://www.w3.org/2000/svg}"
    actions = sum(map(len, schedule.actions))
    boxes = [
        [rect for rect in svg.iter(f"{space}rect") if rect.get("stroke")]
        for svg in (measured, ideal)
    ]
    assert [len(found) for found in boxes] == [actions, actions]
    ends = [
        max(float(rect.get("x")) + float(rect.get("width")) for rect in found) - 70
        for found in boxes
    ]
    assert ends[0] / ends[1] == pytest.approx(
        profile.span / profile.timeline.ideal.makespan, rel=1e-3
    )
    width = float(measured.get("width"))
    assert all(
        float(rect.get("x")) + float(rect.get("width")) <= width
        for found in boxes
        for rect in found
    )


def test_numbers():
    profile = profile_of("1f1b", 2, 4, [3, 3], block_times(block_4=3.0))
    found = json.loads(json.dumps(numbers(profile, advise(profile))))
    assert found["ranks"][0].keys() == {
        "compute",
        "schedule",
        "imbalance",
        "microbatches",
        "communication",
        "peak_memory",
    }
    assert found["bubble"] == pytest.approx(
        1 - sum(rank["compute"] for rank in found["ranks"]) / (2 * found["span_seconds"])
    )
    assert found["layers_per_stage"] == [3, 3]
    assert found["advice"][0]["layers_per_stage"] == [4, 2]


def test_the_chrome_trace_has_each_action_and_wait():
    schedule = build_schedule("1f1b", 2, 2)
    times = Times([1, 1], [1, 1], [1, 1], send=0.5)
    steps = [
        StepTrace(
            3, traced(schedule, times, replicas=2) + traced(schedule, times, data=1, replicas=2)
        )
    ]
    events = chrome_trace(steps)["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"}
    assert names == {(0, "pipeline rank 0"), (1, "pipeline rank 1")}
    of_rank_1 = [
        (e["name"], e["ts"], e["dur"])
        for e in events
        if e["ph"] == "X" and (e["pid"], e["tid"]) == (1, 0)
    ]
    assert of_rank_1 == [
        ("wait for F0", 0.0, 1.5e6),
        ("F0", 1.5e6, 1e6),
        ("B0", 2.5e6, 2e6),
        ("F1", 4.5e6, 1e6),
        ("B1", 5.5e6, 2e6),
    ]
    backward = next(e for e in events if e["name"] == "B1")
    assert backward["args"] == {"step": 3, "microbatch": 1, "chunk": 0, "stage": 0}
    assert {e["tid"] for e in events} == {0, 1}


# -- reading -------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """Two traced steps of two ranks, and one that an earlier run of three ranks left."""
    for trace in traced(
        build_schedule("1f1b", 3, 4), Times([1] * 3, [1] * 3, [1] * 3), step=2, run=0.5
    ):
        write_trace(tmp_path, trace)
    for step in (4, 5):
        for trace in traced(
            build_schedule("1f1b", 2, 4),
            Times([1, 2], [1, 2], [1, 2]),
            step=step,
            counts=[2, 2],
            layers=lambda kind, layer: 0.25,
        ):
            write_trace(tmp_path, trace)
    return tmp_path


def file(run_folder, step, rank):
    return run_folder / "traces" / f"step-{step:08d}-rank-{rank:05d}.json"


def test_traces_are_read_as_written(run_folder):
    steps = read_traces(run_folder)
    assert [step.step for step in steps] == [4, 5], "traces of an earlier attempt are ignored"
    expected = traced(
        build_schedule("1f1b", 2, 4),
        Times([1, 2], [1, 2], [1, 2]),
        step=4,
        counts=[2, 2],
        layers=lambda kind, layer: 0.25,
    )
    assert steps[0].ranks == expected


def test_the_command_writes_page_trace_and_numbers(run_folder, capsys, tmp_path_factory):
    assert main(["profile", str(run_folder)]) == 0
    printed = capsys.readouterr().out
    assert "bubble 33.3%" in printed
    assert (run_folder / "pipeline_profile.html").exists()
    assert json.loads((run_folder / "pipeline_profile.trace.json").read_text())["traceEvents"]
    page = tmp_path_factory.mktemp("elsewhere") / "page.html"
    assert main(["profile", str(run_folder), "--output", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [4, 5]
    assert page.exists()
    assert page.with_suffix(".trace.json").exists()


def error_of(capsys, folder, *arguments):
    assert main(["profile", str(folder), *arguments]) == 1
    error = capsys.readouterr().err
    message, *fixes = error.splitlines()
    assert message.startswith("error: ")
    assert all(line.startswith("  fix: ") for line in fixes)
    return error


def test_a_run_without_traces(capsys, tmp_path):
    assert "has no traces; set profile.steps" in error_of(capsys, tmp_path)
    assert "is not a folder" in error_of(capsys, tmp_path / "nowhere")


def test_missing_ranks(run_folder, capsys):
    file(run_folder, 5, 1).unlink()
    assert "step 5 of rank 1 (of 2) is missing" in error_of(capsys, run_folder)
    file(run_folder, 4, 0).unlink()
    assert "step 4 of rank 0 is missing" in error_of(capsys, run_folder)


def test_a_rank_of_another_attempt(run_folder, capsys):
    path = file(run_folder, 4, 1)
    path.write_text(path.read_text().replace('"run": 1.0', '"run": 0.7'))
    assert "are of different attempts" in error_of(capsys, run_folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"peak_memory"', '"peak"'),
        lambda text: text.replace('"actions": [', '"actions": [[1], '),
    ],
)
def test_a_corrupt_file(run_folder, capsys, damage):
    path = file(run_folder, 5, 1)
    path.write_text(damage(path.read_text()))
    assert f"{path} is corrupt or not a trace" in error_of(capsys, run_folder)


def test_a_step_with_missing_actions(run_folder, capsys):
    path = file(run_folder, 5, 1)
    raw = json.loads(path.read_text())
    raw["actions"] = raw["actions"][:-1]
    path.write_text(json.dumps(raw))
    assert "step 5 is incomplete: rank 1: missing B3" in error_of(capsys, run_folder)


def test_write_errors_of_the_page(run_folder, capsys):
    assert "cannot be written" in error_of(
        capsys, run_folder, "--output", str(run_folder / "no" / "page.html")
    )


def test_the_old_name_of_the_command_is_an_error_with_the_new_one(run_folder, capsys):
    assert main(["xray", str(run_folder)]) == 2
    assert "`megatrain xray` was renamed: use `megatrain profile`" in capsys.readouterr().err


def test_traces_of_older_versions_are_read(run_folder):
    (run_folder / "traces").rename(run_folder / "trace")
    assert [step.step for step in read_traces(run_folder)] == [4, 5]
