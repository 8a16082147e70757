"""Schedules: as drawn, legal for every size, as fast as published, and no slower than torch's."""

import inspect
import itertools
from textwrap import dedent

import pytest

from megatrain.pipeline import schedules
from megatrain.pipeline.schedule import Action, Placement
from megatrain.pipeline.schedules import SCHEDULES, build_schedule, forward_only
from megatrain.pipeline.simulator import even_times, simulate
from megatrain.pipeline.verify import check_schedule

# (function, name, ranks, microbatches, chunks): one column of three characters a unit of time; small letters: second chunk.
DRAWINGS = {
    ("gpipe", "gpipe", 4, 4, 1): """
        0  F0 F1 F2 F3                            B0    B1    B2    B3
        1     F0 F1 F2 F3                   B0    B1    B2    B3
        2        F0 F1 F2 F3          B0    B1    B2    B3
        3           F0 F1 F2 F3 B0    B1    B2    B3
    """,
    ("one_f_one_b", "1f1b", 4, 4, 1): """
        0  F0 F1 F2 F3                   B0       B1       B2       B3
        1     F0 F1 F2             B0    F3 B1       B2       B3
        2        F0 F1       B0    F2 B1    F3 B2       B3
        3           F0 B0    F1 B1    F2 B2    F3 B3
    """,
    ("interleaved", "interleaved", 4, 4, 2): """
        0  F0 F1 F2 F3 f0 f1 f2 f3                   b0       b1       b2       b3    B0    B1    B2    B3
        1     F0 F1 F2 F3 f0 f1 f2 f3          b0       b1       b2       b3    B0    B1    B2    B3
        2        F0 F1 F2 F3 f0 f1 f2    b0    f3 b1       b2       b3    B0    B1    B2    B3
        3           F0 F1 F2 F3 f0 b0    f1 b1    f2 b2    f3 b3    B0    B1    B2    B3
    """,
    ("zb_h1", "zb-h1", 4, 4, 1): """
        0  F0 F1 F2 F3          I0 W0 I1 W1 I2 W2 I3 W3
        1     F0 F1 F2       I0 F3 I1 W0 I2 W1 I3 W2 W3
        2        F0 F1    I0 F2 I1 F3 I2 W0 I3 W1 W2 W3
        3           F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3
    """,
    ("zb_v", "zb-v", 3, 5, 2): """
        0  F0 F1 F2 F3 F4 f0 i0 w0 f1 i1 w1 f2 i2 w2 I0 W0 f3 i3 w3 I1 W1 f4 i4 w4 I2 W2 I3 W3 I4 W4
        1     F0 F1 F2 f0 F3 f1 i0 w0 f2 i1 w1 F4 I0 W0 f3 i2 w2 I1 W1 f4 i3 w3 I2 i4 I3 W2 I4 w4 W3 W4
        2        F0 f0 F1 f1 F2 f2 i0 w0 F3 I0 W0 f3 i1 w1 F4 I1 W1 f4 i2 w2 I2 i3 I3 i4 I4 W2 w3 W3 w4 W4
    """,
    ("dualpipev", "dualpipev", 2, 5, 2): """
        0  F0 F1 F2 f0 i0 w0 f1 F3 b1    f2 B0    F4 b2    f3 B1    b3    f4    B2    b4    I3 W3 I4 W4
        1     F0 f0 F1 f1 F2 b0    f2 B0    F3 b1    f3 B1    F4 b2    f4 B2    b3    B3    i4 I4 w4 W4
    """,
}


def parsed(drawing):
    """Yields each rank's actions with the columns in which they start."""
    for line in drawing.strip("\n").rstrip().splitlines():
        cells = line[11:]
        columns = range(0, len(cells), 3)
        yield [
            (c // 3, Action(cells[c].upper(), int(cells[c + 1]), int(cells[c].islower())))
            for c in columns
            if cells[c] != " "
        ]


def timeline(
    name,
    ranks,
    microbatches,
    chunks=None,
    *,
    forward=1.0,
    input_gradient=1.0,
    weight_gradient=1.0,
    send=0.0,
):
    schedule = build_schedule(name, ranks, microbatches, chunks)
    times = even_times(
        schedule.placement,
        forward=forward,
        input_gradient=input_gradient,
        weight_gradient=weight_gradient,
        send=send,
    )
    return simulate(schedule, times)


def sizes(name):
    family = SCHEDULES[name]
    for ranks in range(1, 9):
        few = family.min_microbatches(ranks)
        for microbatches in sorted(
            {
                few,
                few + 1,
                few + 2,
                ranks - 1,
                ranks,
                ranks + 1,
                2 * ranks - 1,
                2 * ranks,
                3 * ranks + 1,
                24,
            }
        ):
            for chunks in [2, 3, 4] if family.any_chunks else [family.chunks]:
                if microbatches >= few:
                    yield ranks, microbatches, chunks


@pytest.mark.parametrize(("function", "name", "ranks", "microbatches", "chunks"), DRAWINGS)
def test_a_schedule_is_as_drawn(function, name, ranks, microbatches, chunks):
    drawing = DRAWINGS[function, name, ranks, microbatches, chunks]
    assert dedent(drawing).strip() in inspect.getdoc(getattr(schedules, function))
    work = {
        "forward": chunks,
        "input_gradient": chunks,
        "weight_gradient": chunks,
    }  # So that an action takes a column.
    spans = timeline(name, ranks, microbatches, chunks, **work).spans
    assert [[(span.start, span.action) for span in of_rank] for of_rank in spans] == list(
        parsed(drawing)
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_is_legal_and_holds_no_more_than_declared(name):
    tried = 0
    for ranks, microbatches, chunks in sizes(name):
        schedule = build_schedule(name, ranks, microbatches, chunks)
        peaks = check_schedule(schedule, microbatches)
        check_schedule(forward_only(schedule), microbatches, backward=False)
        if microbatches >= 2 * ranks:
            assert peaks == schedule.peaks
        tried += 1
    assert tried > 25


def test_the_sizes_are_hundreds():
    assert sum(len(list(sizes(name))) for name in SCHEDULES) > 400


def test_placements():
    assert [[Placement(4, 2, "loop").stage(r, c) for r in range(4)] for c in range(2)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert [[Placement(4, 2, "v").stage(r, c) for r in range(4)] for c in range(2)] == [
        [0, 1, 2, 3],
        [7, 6, 5, 4],
    ]
    for shape, ranks, chunks in itertools.product(["loop", "v"], range(1, 6), range(1, 4)):
        placement = Placement(ranks, chunks, shape)
        places = [placement.location(stage) for stage in range(placement.stages)]
        assert [placement.stage(*place) for place in places] == list(range(placement.stages))
        assert len(set(places)) == placement.stages


def test_consumers_and_producers():
    v = Placement(2, 2, "v")
    assert [
        v.consumer(0, Action("F", 0)),
        v.consumer(1, Action("F", 0)),
        v.consumer(0, Action("F", 0, 1)),
    ] == [(1, 0), (1, 1), None]
    assert [
        v.consumer(1, Action("I", 0, 1)),
        v.consumer(0, Action("B", 0)),
        v.consumer(1, Action("W", 0)),
    ] == [(1, 0), None, None]
    assert [
        v.producer(0, Action("F", 0)),
        v.producer(1, Action("F", 0, 1)),
        v.producer(0, Action("B", 0, 1)),
    ] == [None, (1, 0), None]


# -- bubbles -------------------------------------------------------------------------------------

COSTS = [(1, 1, 1), (1, 2, 0.5), (2, 1.5, 1), (0.5, 1, 1)]
SIZES = [(1, 3), (2, 2), (2, 7), (4, 8), (5, 20), (8, 16)]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("f", "i", "w"), COSTS)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubble_of_1f1b_and_gpipe(name, p, m, f, i, w):
    made = timeline(name, p, m, forward=f, input_gradient=i, weight_gradient=w)
    assert made.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert made.makespan == pytest.approx((m + p - 1) * (f + i + w))


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize(("f", "i", "w"), COSTS)
@pytest.mark.parametrize(("p", "m"), [(p, k * p + k // 2) for p in (2, 4, 5, 8) for k in (1, 2, 3)])
def test_bubble_of_interleaved(p, m, v, f, i, w):
    """Megatron-LM section 2.2.2: (p-1)/(v*m) of the work idles; also where `p` does not divide `m`."""
    made = timeline("interleaved", p, m, v, forward=f, input_gradient=i, weight_gradient=w)
    assert made.bubble == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (1, 1.2, 0.8), (1, 1.1, 0.6), (1, 1, 0.5)])
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 16), (6, 12), (8, 16)])
def test_bubble_of_zb_h1(p, m, f, i, w):
    """Zero Bubble section 2.3, table 2: (p-1)(F+B-W)."""
    made = timeline("zb-h1", p, m, forward=f, input_gradient=i, weight_gradient=w)
    assert made.makespan - m * (f + i + w) == pytest.approx((p - 1) * (f + i - w))


@pytest.mark.parametrize(
    ("p", "m"), [(p, 2 * p - 1 + extra) for p in range(1, 9) for extra in (0, 1, 9)]
)
def test_zb_v_waits_for_nothing_but_the_first_microbatch(p, m):
    made = timeline("zb-v", p, m, forward=2, input_gradient=2, weight_gradient=2)
    assert [spans[0].start for spans in made.spans] == list(range(p))
    assert all(
        span.end == after.start for spans in made.spans for span, after in itertools.pairwise(spans)
    )
    assert max(made.peak_activations) <= 2 * p


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 10), (8, 20)])
def test_bubble_of_dualpipev(p, m):
    """No more than the (PP/2-1)(F&B+B-3W) of DeepSeek's table, for PP/2 ranks, where F&B = F+B = 3 and W = 1."""
    made = timeline("dualpipev", p, m, forward=2, input_gradient=2, weight_gradient=2)
    assert made.makespan - 6 * m <= (p - 1) * (3 + 2 - 3)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("interleaved", 33 / 28.5), ("zb-h1", 33 / 27), ("zb-v", 33 / 25.5), ("dualpipev", 33 / 25.5)],
)
def test_throughput_relative_to_1f1b(name, ratio):
    assert timeline("1f1b", 4, 8).makespan / timeline(name, 4, 8).makespan == pytest.approx(ratio)


# -- torch's schedules ---------------------------------------------------------------------------


class FakeStage:
    """The attributes of a stage that torch's schedules read."""

    device, has_backward, is_first, is_last = "cpu", True, False, False

    def __init__(self, ranks, stages, index):
        self.group_size, self.num_stages, self.group_rank, self.stage_index = (
            ranks,
            stages,
            0,
            index,
        )
        self.submod = None


def torch_schedule(cls, ranks, microbatches, chunks, shape):
    from torch.distributed.pipelining import schedules as theirs

    placement = Placement(ranks, chunks, shape)
    stages = [
        FakeStage(ranks, placement.stages, placement.stage(0, chunk)) for chunk in range(chunks)
    ]
    made = getattr(theirs, cls)(stages, microbatches)
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}

    def ours(action):
        parts = action.sub_actions if getattr(action, "sub_actions", None) else [action]
        return [
            Action(
                kinds[part.computation_type.name],
                part.microbatch_index,
                placement.location(part.stage_index).chunk,
            )
            for part in parts
        ]

    actions = [
        [a for step in made.pipeline_order[rank] if step is not None for a in ours(step)]
        for rank in range(ranks)
    ]
    return schedules.Schedule(cls, placement, actions, [10**9] * ranks)


@pytest.mark.parametrize(
    ("name", "cls", "chunks", "shape"),
    [
        ("interleaved", "ScheduleInterleaved1F1B", 2, "loop"),
        ("interleaved", "ScheduleInterleaved1F1B", 3, "loop"),
        ("zb-h1", "ScheduleInterleavedZeroBubble", 1, "loop"),
        ("zb-v", "ScheduleZBVZeroBubble", 2, "v"),
        ("dualpipev", "ScheduleDualPipeV", 2, "v"),
    ],
)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (3, 6), (4, 8), (4, 16), (8, 16)])
@pytest.mark.parametrize("times", [(1, 1, 1, 0), (1, 1.2, 0.8, 0), (1, 1, 1, 0.05)])
def test_no_slower_than_torch(name, cls, chunks, shape, ranks, microbatches, times):
    theirs = torch_schedule(cls, ranks, microbatches, chunks, shape)
    check_schedule(theirs, microbatches)
    f, i, w, send = times
    given = {"forward": f, "input_gradient": i, "weight_gradient": w, "send": send}
    limit = simulate(theirs, even_times(theirs.placement, **given)).makespan
    assert timeline(name, ranks, microbatches, chunks, **given).makespan <= limit + 1e-9
