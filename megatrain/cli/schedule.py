"""`megatrain schedule NAME --ranks 4 --microbatches 8`: simulate a pipeline schedule, draw it, write it to a file."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

from megatrain.errors import ConfigError, UserError
from megatrain.pipeline.plot import draw_svg, draw_text
from megatrain.pipeline.registry import make_schedule
from megatrain.pipeline.schedule import Schedule
from megatrain.pipeline.schedule_csv import write_schedule
from megatrain.pipeline.schedules import SCHEDULES
from megatrain.pipeline.simulator import Timeline, even_times, simulate
from megatrain.pipeline.verify import check_schedule
from megatrain.planner.schedule_search import EvenCosts, find_candidates


class RankTimes(NamedTuple):
    """Times of one microbatch on all of a rank's layers, and of one message between ranks."""

    forward: float
    input_gradient: float
    weight_gradient: float
    send: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument(
        "name",
        metavar="NAME",
        help=f"{', '.join(SCHEDULES)}, a CSV file of actions, or auto: the fastest for --times",
    )
    parser.add_argument(
        "--ranks", type=_positive, required=True, metavar="N", help="ranks of the pipeline"
    )
    parser.add_argument(
        "--microbatches",
        type=_positive,
        required=True,
        metavar="N",
        help="microbatches of one step",
    )
    parser.add_argument(
        "--virtual",
        type=_positive,
        metavar="N",
        help="chunks of layers a rank (default: the schedule's own)",
    )
    parser.add_argument(
        "--times",
        type=_times,
        default=RankTimes(1, 1, 1, 0),
        metavar="F,I,W,SEND",
        help="times of a microbatch on a rank, of all its chunks together: forward, input gradient, weight gradient; and of "
        "a message between ranks (default: 1,1,1,0)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print makespan, bubble and peak activations as JSON, no table",
    )
    parser.add_argument("--svg", metavar="FILE", help="draw it to an SVG file")
    parser.add_argument(
        "--csv", metavar="FILE", help="write its actions to a CSV file, which is a schedule again"
    )


def run(args: argparse.Namespace) -> int:
    """Check, simulate, print and write."""
    schedule = (
        _fastest(args)
        if args.name == "auto"
        else make_schedule(
            args.name, ranks=args.ranks, microbatches=args.microbatches, virtual_stages=args.virtual
        )
    )
    check_schedule(schedule, args.microbatches)
    timeline = simulate(schedule, even_times(schedule.placement, **args.times._asdict()))
    if args.svg:
        _write(args.svg, draw_svg(timeline))
    if args.csv:
        _write(args.csv, write_schedule(schedule))
    if args.json:
        summary = {
            "makespan": timeline.makespan,
            "bubble": timeline.bubble,
            "peak_activations": timeline.peak_activations,
        }
        print(json.dumps(summary | ({"schedule": schedule.name} if args.name == "auto" else {})))
    else:
        if args.name == "auto":
            print(
                f"{_title(schedule)}: the fastest for these times, of those that hold no more activations than 1f1b's first rank"
            )
        print(_table(timeline))
        print(f"\n{draw_text(timeline, shutil.get_terminal_size().columns - 1)}")
    return 0


def _fastest(args: argparse.Namespace) -> Schedule:
    """What `parallel.schedule: auto` would choose for a model that is cut evenly and takes the times that are given."""
    if args.virtual is not None:
        raise ConfigError(
            "--virtual",
            args.virtual,
            "is given and auto chooses it",
            "leave --virtual out, or name a schedule",
        )
    costs = EvenCosts(*args.times)
    return find_candidates(
        costs, ranks=args.ranks, microbatches=args.microbatches, limit=args.ranks * (1 + 1e-9)
    )[0].schedule


def _title(schedule: Schedule) -> str:
    name = (
        "a schedule made for them (--csv FILE writes it)"
        if schedule.name == "list"
        else schedule.name
    )
    chunks = schedule.placement.chunks
    return f"auto: {name}" + (
        f", {chunks} chunks a rank in a {'V' if schedule.placement.shape == 'v' else 'loop'}"
        if chunks > 1
        else ""
    )


def _table(timeline: Timeline) -> str:
    """By rank: time at work, share of the makespan that it idles, and activations held; then the whole."""
    lines = [f"{'rank':>4}{'busy':>10}{'bubble':>9}{'peak activations':>19}"]
    rows = zip(timeline.busy, timeline.peak_activations, strict=True)
    for rank, (busy, peak) in enumerate(rows):
        lines.append(f"{rank:>4}{busy:>10.4g}{1 - busy / timeline.makespan:>9.1%}{peak:>19}")
    lines.append(
        f"{'all':>4}{sum(timeline.busy):>10.4g}{timeline.bubble:>9.1%}{max(timeline.peak_activations):>19}"
    )
    return "\n".join(
        [*lines, f"makespan {timeline.makespan:.6g}", _unit(timeline.schedule.placement.chunks)]
    )


def _unit(chunks: int) -> str:
    """What peak activations are counted in, which differs between schedules."""
    if chunks == 1:
        return "activations: one is a microbatch's in all layers of a rank"
    return f"activations: one is a microbatch's in one of the {chunks} chunks of a rank's layers; {chunks} are those of all its layers"


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _times(text: str) -> RankTimes:
    try:
        times = RankTimes(*map(float, text.split(",")))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not four numbers with commas, such as 1,1,1,0.05"
        ) from None
    if not all(math.isfinite(time) and time >= 0 for time in times) or not any(times[:3]):
        raise argparse.ArgumentTypeError(f"{text!r}: times are 0 or more, and some work takes time")
    return times
