"""Compares the executor with the simulator and with DeepSpeed's PipelineEngine.

    python benchmarks/pipeline.py sleep     4 ranks whose compute sleeps: bubbles, throughputs
    python benchmarks/pipeline.py real      2 ranks x 1 thread of a real model: bubbles
    python benchmarks/pipeline.py auto      4 ranks whose blocks sleep: auto against 1f1b
    python benchmarks/pipeline.py overhead  cost of an action besides its compute

Contenders share the ranks and take turns, a lap each, so that noise of the machine affects all.
Each figure is the median over laps; ratios are medians of the ratios of laps. A bubble is the idle
share of ranks x makespan: a rank is busy while an action computes, and idle while it waits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from pipeline_contenders import (
    BASE,
    BLOCKS,
    SCHEDULES,
    WIDTH,
    make_runners,
    make_settled,
    make_sleepers,
    make_tiny,
)
from pipeline_ranks import Ranks, race

if TYPE_CHECKING:
    from megatrain.pipeline.executor import ActionTiming
    from megatrain.pipeline.schedule import Action, Schedule
    from megatrain.pipeline.simulator import Timeline, Times


# -- bubbles -------------------------------------------------------------------------------------


def makespan(lap: list[list[ActionTiming]]) -> float:
    """Returns the seconds from the first start to the last end; ranks share the machine's clock."""
    return max(records[-1].end for records in lap) - min(records[0].start for records in lap)


def bubble(lap: list[list[ActionTiming]]) -> float:
    """Returns the idle share of ranks x makespan."""
    busy = sum(record.end - record.ready for records in lap for record in records)
    return 1 - busy / (len(lap) * makespan(lap))


def measured_times(schedule: Schedule, lap: list[list[ActionTiming]]) -> Times:
    """Returns the mean times of each stage's actions in this lap; B counts as an input gradient."""
    from megatrain.pipeline.simulator import Times

    spent: dict[tuple[str, int], list[float]] = {}
    for rank, records in enumerate(lap):
        for record in records:
            stage = schedule.placement.stage(rank, record.action.chunk)
            spent.setdefault((record.action.kind, stage), []).append(record.end - record.ready)
    mean = {key: statistics.fmean(seconds) for key, seconds in spent.items()}
    stages = range(schedule.placement.stages)
    input_gradient = [mean["I", s] if ("I", s) in mean else mean["B", s] for s in stages]
    return Times(
        [mean["F", s] for s in stages], input_gradient, [mean.get(("W", s), 0.0) for s in stages]
    )


def own_times(schedule: Schedule, lap: list[list[ActionTiming]]) -> Times:
    """Returns the measured time of each action; the rest of the makespan is added waiting."""
    from megatrain.pipeline.simulator import Times

    spent = {
        (schedule.placement.stage(rank, record.action.chunk), record.action): record.end
        - record.ready
        for rank, records in enumerate(lap)
        for record in records
    }

    class OwnTimes(Times):
        def duration(self, action: Action, stage: int) -> float:
            return spent[stage, action]

    return OwnTimes([], [], [])


class Row(NamedTuple):
    """Bubbles of a schedule's laps, measured and simulated, and makespans in seconds."""

    measured: list[float]
    simulated: list[float]
    spans: list[float]
    ideal_span: float | None = None
    replayed: list[float] | None = None
    """Simulated with each action's own time."""


def print_bubbles(rows: dict[str, Row]) -> None:
    base = rows[BASE]
    print(
        f"{'':14}{'bubble':>9}{'simulated':>11}{'points off':>12}{'own times':>11}"
        f"{'makespan ms':>13}{'x 1f1b':>9}{'simulated':>11}"
    )
    for name, row in rows.items():
        off = statistics.median(
            100 * (a - b) for a, b in zip(row.measured, row.simulated, strict=True)
        )
        replayed = f"{statistics.median(row.replayed):.1%}" if row.replayed else "-"
        ratio = statistics.median(a / b for a, b in zip(base.spans, row.spans, strict=True))
        ideal = (
            f"{base.ideal_span / row.ideal_span:.3f}" if base.ideal_span and row.ideal_span else "-"
        )
        print(
            f"{name:14}{statistics.median(row.measured):>9.1%}"
            f"{statistics.median(row.simulated):>11.1%}{off:>+12.2f}{replayed:>11}"
            f"{1e3 * statistics.median(row.spans):>13.1f}{ratio:>9.3f}{ideal:>11}"
        )


# -- compute that sleeps -------------------------------------------------------------------------


def simulated(name: str, ranks: int, microbatches: int, part: float) -> Timeline:
    """Simulates a schedule with `part` seconds per rank for each of F, I and W."""
    from megatrain.pipeline.schedules import build_schedule
    from megatrain.pipeline.simulator import even_times, simulate

    schedule = build_schedule(name, ranks, microbatches)
    return simulate(
        schedule,
        even_times(schedule.placement, forward=part, input_gradient=part, weight_gradient=part),
    )


def sleep(args: argparse.Namespace) -> None:
    part = args.part / 1e3
    ranks = Ranks(args.ranks, make_sleepers, part=part, microbatches=args.microbatches)
    rows = {}
    for name, laps in race(ranks, list(SCHEDULES), args.laps).items():
        ideal = simulated(name, args.ranks, args.microbatches, part)
        rows[name] = Row(
            [bubble(lap) for lap in laps],
            [ideal.bubble] * len(laps),
            [makespan(lap) for lap in laps],
            ideal.makespan,
        )
    print(
        f"{args.ranks} ranks, {args.microbatches} microbatches, "
        f"forward = input = weight gradient = {args.part:g} ms a rank, asleep"
    )
    print_bubbles(rows)


# -- a real model --------------------------------------------------------------------------------


def real(args: argparse.Namespace) -> None:
    from megatrain.pipeline.schedules import build_schedule
    from megatrain.pipeline.simulator import simulate

    ranks = Ranks(2, make_runners, microbatches=args.microbatches)
    rows = {}
    for name, laps in race(ranks, list(SCHEDULES), args.laps).items():
        schedule = build_schedule(name, 2, args.microbatches)
        by_mean, by_own = (
            [simulate(schedule, times(schedule, lap)).bubble for lap in laps]
            for times in (measured_times, own_times)
        )
        rows[name] = Row(
            [bubble(lap) for lap in laps], by_mean, [makespan(lap) for lap in laps], replayed=by_own
        )
    print(
        f"2 ranks x 1 thread, {args.microbatches} microbatches; simulated from each lap's "
        "mean times by stage and kind of action,"
    )
    print("and from each action's own time: the rest is what the executor and the messages add")
    print_bubbles(rows)


# -- what auto settles on ------------------------------------------------------------------------

SLOW_BLOCKS = {5: 3.0, 6: 3.0}
"""Slow blocks of the uneven model, with their time relative to the others."""


def auto(args: argparse.Namespace) -> None:
    for title, slow in (("even", {}), ("uneven", SLOW_BLOCKS)):
        seconds = [
            args.part / 1e3 * args.ranks / BLOCKS * slow.get(block, 1.0) for block in range(BLOCKS)
        ]
        with tempfile.TemporaryDirectory() as folder:
            ranks = Ranks(
                args.ranks,
                make_settled,
                seconds=seconds,
                microbatches=args.microbatches,
                folder=folder,
            )
            description = ranks.lap("description")[0]
            laps = race(ranks, [BASE, "auto"], args.laps)
        spans = {name: [makespan(lap) for lap in of_name] for name, of_name in laps.items()}
        ratio = statistics.median(a / b for a, b in zip(spans[BASE], spans["auto"], strict=True))
        print(
            f"{title} blocks, {args.ranks} ranks, {args.microbatches} microbatches, "
            f"{args.part:g} ms a rank in the mean for each of F, I and W, asleep"
        )
        for name, of_name in laps.items():
            print(
                f"  {name:8}{1e3 * statistics.median(spans[name]):>8.1f} ms, bubble "
                f"{statistics.median(map(bubble, of_name)):.1%}"
            )
        print(f"  auto is {ratio:.3f} x 1f1b; it chose {description}")


# -- what an action costs ------------------------------------------------------------------------


def overhead(args: argparse.Namespace) -> None:
    from megatrain.pipeline.schedules import build_schedule

    ranks = Ranks(args.ranks, make_tiny, microbatches=args.microbatches, steps=args.steps)
    names = ["bare", "PipelineEngine", *SCHEDULES]
    seconds = {
        name: [max(lap) for lap in laps] for name, laps in race(ranks, names, args.laps).items()
    }
    counts = {
        name: len(build_schedule(name, args.ranks, args.microbatches).actions[0])
        for name in SCHEDULES
    }
    counts |= {"bare": 2 * args.microbatches, "PipelineEngine": 2 * args.microbatches}
    print(
        f"{args.ranks} ranks x 1 thread, {args.microbatches} microbatches, a linear layer "
        f"of {WIDTH} a stage; time of a step / its actions"
    )
    print(
        f"{'':16}{'actions':>8}{'us an action':>14}{'x PipelineEngine':>18}"
        f"{'less bare, us':>15}{'x PipelineEngine':>18}"
    )

    def each(name: str) -> list[float]:
        return [1e6 * second / counts[name] for second in seconds[name]]

    def less_bare(name: str) -> list[float]:
        """Returns microseconds per action minus those of the bare layer, which runs per chunk."""
        chunks = (
            build_schedule(name, args.ranks, args.microbatches).placement.chunks
            if name in SCHEDULES
            else 1
        )
        return [
            1e6 * (a - chunks * b) / counts[name]
            for a, b in zip(seconds[name], seconds["bare"], strict=True)
        ]

    for name in names:
        whole = statistics.median(
            a / b for a, b in zip(each(name), each("PipelineEngine"), strict=True)
        )
        alone = statistics.median(
            a / b for a, b in zip(less_bare(name), less_bare("PipelineEngine"), strict=True)
        )
        net = "-" if name == "bare" else f"{statistics.median(less_bare(name)):.0f}"
        share = "-" if name == "bare" else f"{alone:.2f}"
        print(
            f"{name:16}{counts[name]:>8}{statistics.median(each(name)):>14.0f}"
            f"{whole:>18.2f}{net:>15}{share:>18}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["sleep", "real", "auto", "overhead"])
    parser.add_argument(
        "--ranks", type=int, help="4 for sleep and auto, 2 for overhead unless given; real has 2"
    )
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument(
        "--part",
        type=float,
        default=30.0,
        help="sleep and auto: milliseconds of a forward, of an input and of a weight gradient",
    )
    parser.add_argument("--steps", type=int, default=10, help="overhead: steps of a lap")
    parser.add_argument("--laps", type=int, help="7, for overhead 30, unless given")
    args = parser.parse_args()
    args.ranks = args.ranks or {"sleep": 4, "real": 2, "auto": 4, "overhead": 2}[args.what]
    args.laps = args.laps or {"sleep": 7, "real": 7, "auto": 7, "overhead": 30}[args.what]
    {"sleep": sleep, "real": real, "auto": auto, "overhead": overhead}[args.what](args)


if __name__ == "__main__":
    main()
