"""`megatrain profile RUN`: a page and a Chrome trace of a run's traced steps, with advice."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatrain.cli.arguments import write_text
from megatrain.report.bottlenecks import advise
from megatrain.report.chrome_trace import chrome_trace
from megatrain.report.timeline_page import PARTS, numbers, render_timeline_page
from megatrain.telemetry.bubble_analysis import profile_pipeline
from megatrain.telemetry.trace_format import read_traces

PAGE_NAME = "pipeline_profile.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("run", metavar="RUN", help="a run folder with traces (profile.steps)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"the page (default: RUN/{PAGE_NAME}); the Chrome trace is FILE with .trace.json",
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Reads the traces, writes page and Chrome trace, and prints a summary."""
    folder = Path(args.run)
    steps = read_traces(folder)
    profile = profile_pipeline(steps)
    advice = advise(profile)
    page = Path(args.output) if args.output else folder / PAGE_NAME
    trace = page.with_suffix(".trace.json")
    write_text(page, render_timeline_page(profile, advice))
    write_text(trace, json.dumps(chrome_trace(steps)))
    if args.json:
        print(json.dumps(numbers(profile, advice)))
        return 0
    total = profile.total
    parts = [
        f"{name} {getattr(total, part) / profile.span:.1%}"
        for part, (name, _) in PARTS.items()
        if part != "compute"
    ]
    print(
        f"{1e3 * profile.span:.1f} ms in the pipeline, "
        f"bubble {total.waiting / profile.span:.1%}: {', '.join(parts)}"
    )
    for item in advice:
        print(f"- {item.text}")
    print(f"page: {page}\ntrace for chrome://tracing or ui.perfetto.dev: {trace}")
    return 0
