"""`megatrain schedule NAME --ranks 4 --microbatches 8`: simulates and draws a pipeline schedule."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from typing import NamedTuple

from megatrain.cli.arguments import positive_int, write_text
from megatrain.errors import ConfigError
from megatrain.pipeline.plot import draw_svg, draw_text
from megatrain.pipeline.registry import make_schedule
from megatrain.pipeline.schedule import Schedule
from megatrain.pipeline.schedule_csv import write_schedule
from megatrain.pipeline.schedules import SCHEDULES
from megatrain.pipeline.simulator import Timeline, even_times, simulate
from megatrain.pipeline.verify import check_schedule
from megatrain.planner.schedule_search import EvenCosts, find_candidates


class RankTimes(NamedTuple):
    """Times of one microbatch in all layers of a rank, and of one message between ranks."""

    forward: float
    input_gradient: float
    weight_gradient: float
    send: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "name",
        metavar="NAME",
        help=f"{', '.join(SCHEDULES)}, a CSV file of actions, or auto: the fastest for --times",
    )
    numbers = {
        "--ranks": "pipeline ranks",
        "--microbatches": "microbatches of one step",
        "--virtual": "virtual stages per rank (default: those of the schedule)",
    }
    for option, description in numbers.items():
        required = option != "--virtual"
        parser.add_argument(
            option, type=positive_int, required=required, metavar="N", help=description
        )
    parser.add_argument(
        "--times",
        type=_parse_times,
        default=RankTimes(1, 1, 1, 0),
        metavar="F,I,W,SEND",
        help="times of a microbatch in all layers of a rank (forward, input gradient, weight "
        "gradient) and of a message between ranks (default: 1,1,1,0)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print makespan, bubble and peak activations as JSON",
    )
    parser.add_argument("--svg", metavar="FILE", help="draw the schedule to an SVG file")
    parser.add_argument(
        "--csv", metavar="FILE", help="write a CSV file of actions, which NAME can be"
    )


def run(args: argparse.Namespace) -> int:
    """Verifies and simulates a schedule, prints it, and writes the requested files."""
    is_auto = args.name == "auto"
    schedule = _find_fastest(args) if is_auto else _make(args)
    check_schedule(schedule, args.microbatches)
    timeline = simulate(schedule, even_times(schedule.placement, **args.times._asdict()))
    if args.svg:
        write_text(args.svg, draw_svg(timeline))
    if args.csv:
        write_text(args.csv, write_schedule(schedule))
    if args.json:
        summary = {
            "makespan": timeline.makespan,
            "bubble": timeline.bubble,
            "peak_activations": timeline.peak_activations,
        }
        print(json.dumps(summary | ({"schedule": schedule.name} if is_auto else {})))
        return 0
    if is_auto:
        print(
            f"auto: {_describe(schedule)}: the fastest for these times among schedules that hold "
            "no more activations than the first rank of 1f1b"
        )
    print(_table(timeline))
    print(f"\n{draw_text(timeline, shutil.get_terminal_size().columns - 1)}")
    return 0


def _make(args: argparse.Namespace) -> Schedule:
    return make_schedule(
        args.name, ranks=args.ranks, microbatches=args.microbatches, virtual_stages=args.virtual
    )


def _find_fastest(args: argparse.Namespace) -> Schedule:
    """Returns the choice of `parallel.schedule=auto` for an evenly cut model with these times."""
    if args.virtual is not None:
        raise ConfigError(
            "--virtual",
            args.virtual,
            "is not supported with auto, which chooses it",
            "leave --virtual out, or name a schedule",
        )
    candidates = find_candidates(
        EvenCosts(*args.times),
        ranks=args.ranks,
        microbatches=args.microbatches,
        limit=args.ranks * (1 + 1e-9),
    )
    return candidates[0].schedule


def _describe(schedule: Schedule) -> str:
    name = "a new schedule (--csv FILE writes it)" if schedule.name == "list" else schedule.name
    placement = schedule.placement
    if placement.chunks == 1:
        return name
    shape = "V" if placement.shape == "v" else "loop"
    return f"{name}, {placement.chunks} virtual stages per rank in a {shape}"


def _table(timeline: Timeline) -> str:
    """Returns busy time, bubble and peak activations of each rank and of all."""
    lines = [f"{'rank':>4}{'busy':>10}{'bubble':>9}{'peak activations':>19}"]
    peaks = timeline.peak_activations
    for rank, (busy, peak) in enumerate(zip(timeline.busy, peaks, strict=True)):
        lines.append(f"{rank:>4}{busy:>10.4g}{1 - busy / timeline.makespan:>9.1%}{peak:>19}")
    lines.append(f"{'all':>4}{sum(timeline.busy):>10.4g}{timeline.bubble:>9.1%}{max(peaks):>19}")
    lines.append(f"makespan {timeline.makespan:.6g}")
    lines.append(_activation_unit(timeline.schedule.placement.chunks))
    return "\n".join(lines)


def _activation_unit(chunks: int) -> str:
    if chunks == 1:
        return "activations: one per microbatch, of all layers of a rank"
    return f"activations: one per microbatch and virtual stage; {chunks} are those of all layers"


def _parse_times(text: str) -> RankTimes:
    try:
        times = RankTimes(*map(float, text.split(",")))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be four numbers with commas, such as 1,1,1,0.05"
        ) from None
    if not all(math.isfinite(time) and time >= 0 for time in times) or not any(times[:3]):
        raise argparse.ArgumentTypeError(
            f"{text!r}: times must be at least 0, and one of the first three must be above 0"
        )
    return times
