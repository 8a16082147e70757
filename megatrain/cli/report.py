"""`megatrain report RUN`: one HTML page of a run's curves, events and times, or of several runs."""

from __future__ import annotations

import argparse
import os
from datetime import datetime
from pathlib import Path

from megatrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="folder of a run, running or ended; several are compared in the same charts",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="HTML file (default: report.html in the first RUN)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page."""
    from megatrain.report.page import render_report
    from megatrain.report.run_folder import read_run

    folders = [read_run(Path(name)) for name in args.runs]
    path = Path(args.output) if args.output else folders[0].path / "report.html"
    _write(path, render_report(folders, now=datetime.now().astimezone()))
    print(f"report: {path}")
    return 0


def _write(path: Path, text: str) -> None:
    """Replaces the page atomically: a browser, or a second command, may use it at any time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
