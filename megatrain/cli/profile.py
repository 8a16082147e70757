"""`megatrain xray RUN`: a page and a Chrome trace of the steps that a run traced, with advice in words."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatrain.errors import UserError
from megatrain.report.bottlenecks import advise
from megatrain.report.timeline_page import PARTS, chrome_trace, numbers, render_timeline_page
from megatrain.telemetry.bubble_analysis import profile_pipeline
from megatrain.telemetry.trace_format import read_traces


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument("run", metavar="RUN", help="a run's folder; the run had profile.steps set")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page (default: RUN/xray.html); the Chrome trace goes beside it as FILE's name with .trace.json",
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON, no words")


def run(args: argparse.Namespace) -> int:
    """Read, examine, write and print."""
    folder = Path(args.run)
    steps = read_traces(folder)
    xray = profile_pipeline(steps)
    advice = advise(xray)
    page = Path(args.output) if args.output else folder / "xray.html"
    trace = page.with_suffix(".trace.json")
    _write(page, render_timeline_page(xray, advice))
    _write(trace, json.dumps(chrome_trace(steps)))
    if args.json:
        print(json.dumps(numbers(xray, advice)))
        return 0
    total = xray.total
    print(
        f"{1e3 * xray.span:.1f} ms in the pipeline, bubble {total.waiting / xray.span:.1%}: "
        + ", ".join(
            f"{PARTS[part][0]} {getattr(total, part) / xray.span:.1%}"
            for part in PARTS
            if part != "compute"
        )
    )
    for item in advice:
        print(f"- {item.text}")
    print(f"the page is {page}, the trace for chrome://tracing or ui.perfetto.dev {trace}")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
