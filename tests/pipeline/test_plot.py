"""Drawings: text that fits the width, and an SVG that shows each action once."""

from xml.etree import ElementTree

import pytest

from megatrain.pipeline.plot import draw_svg, draw_text
from megatrain.pipeline.schedules import SCHEDULES, build_schedule, forward_only
from megatrain.pipeline.simulator import even_times, simulate

SVG = "{http://www.w3.org/2000/svg}"


def timeline(name, ranks=4, microbatches=8, send=0.0):
    schedule = build_schedule(name, ranks, microbatches)
    return simulate(
        schedule,
        even_times(schedule.placement, forward=1, input_gradient=1, weight_gradient=1, send=send),
    )


def test_text_to_scale():
    assert draw_text(timeline("1f1b", 2, 2), 80).splitlines() == [
        "0  F0 F1 ......B0--- ...B1---",
        "1  ...F0 B0--- F1 B1--- ......",
        "",
        "F forward, B backward; dots: idle",
    ]


def test_narrow_text_shows_letters():
    assert draw_text(timeline("zb-v", 2, 3), 22).splitlines() == [
        "0  FFFfiwfiwIWfiwIWIW.",
        "1  .FfFfiwFIWfiwIiIWwW",
        "",
        "F forward, I input",
        "gradient, W weight",
        "gradient; small",
        "letters: chunk 1;",
        "dots: idle",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("width", [20, 79, 200])
def test_text_fits(name, width):
    drawn = draw_text(timeline(name, send=0.05), width).split("\n\n")[0].splitlines()
    assert len(drawn) == 4
    assert all(len(line) <= width for line in drawn)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_picture_holds_each_action_where_it_is(name):
    made = timeline(name)
    root = ElementTree.fromstring(draw_svg(made))
    boxes = [rect for rect in root.iter(f"{SVG}rect") if rect.get("stroke") == "white"]
    spans = [span for of_rank in made.spans for span in of_rank]
    assert len(boxes) == len(spans)
    last = boxes[len(made.spans[0]) - 1]
    scale = (float(last.get("x")) + float(last.get("width")) - 70) / made.spans[0][-1].end
    for box, span in zip(boxes, spans, strict=True):
        assert float(box.get("x")) == pytest.approx(70 + span.start * scale, abs=0.1)
        assert float(box.get("width")) == pytest.approx((span.end - span.start) * scale, abs=0.1)
    colours = {box.get("fill") for box in boxes}
    kinds = {(action.kind, action.chunk) for actions in made.schedule.actions for action in actions}
    assert len(colours) == len(kinds)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    numbers = [
        text
        for line in "".join(f"\n{t}" for t in texts).split("\nrank ")[1:]
        for text in line.split("\n")[1:]
        if text.isdecimal()
    ]
    assert numbers[: len(spans)] == [str(span.action.microbatch) for span in spans]
    assert {"warm-up", "cool-down", "bubble (idle)"} <= set(texts)
    width = float(root.get("width"))
    assert all(float(e.get("x", 0)) < width for e in root.iter() if e.get("x"))


def test_evaluation_can_be_drawn_and_names_are_escaped():
    schedule = forward_only(build_schedule("zb-v", 2, 3))
    named = type(schedule)("a<b>&.csv", schedule.placement, schedule.actions, schedule.peaks)
    made = simulate(
        named, even_times(named.placement, forward=1, input_gradient=1, weight_gradient=1)
    )
    assert (
        "a<b>&.csv: 2 ranks" in next(ElementTree.fromstring(draw_svg(made)).iter(f"{SVG}text")).text
    )
    assert "forward" in draw_text(made, 80)
