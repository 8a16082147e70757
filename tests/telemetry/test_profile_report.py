"""Advice, page, numbers and Chrome trace of synthetic pipeline profiles."""

import itertools
import json
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from helpers.synthetic_traces import stage_times, traced

from megatrain.pipeline.partition import blocks_per_stage
from megatrain.pipeline.schedules import SCHEDULES, build_schedule
from megatrain.pipeline.simulator import Times, simulate
from megatrain.planner.cost_model import best_cut, cost_model, cut_of, rank_slowness
from megatrain.report.bottlenecks import advise
from megatrain.report.chrome_trace import chrome_trace
from megatrain.report.timeline_page import numbers, render_timeline_page
from megatrain.telemetry.bubble_analysis import (
    profile_pipeline,
)
from megatrain.telemetry.trace_format import (
    StepTrace,
)

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
        "(block 4 alone takes 3.0 times the median block): "
        "move block 3 from stage 1 to stage 0 → predicted −"
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


def test_slow_rank_is_not_attributed_to_its_layers():
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


def test_numbers_equal_the_profile():
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
