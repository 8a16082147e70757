"""`megatrain report RUN`: a run's curves, events and times as one HTML page; several runs beside each other."""

from __future__ import annotations

import argparse
import os
from datetime import datetime
from pathlib import Path

from megatrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run's folder, whether it goes on, has ended or was killed; several are laid over each other",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the page (default: report.html in the first run's folder)"
    )


def run(args: argparse.Namespace) -> int:
    """Read, draw and write."""
    from megatrain.report.page import render_report
    from megatrain.report.run_folder import read_run

    folders = [read_run(Path(name)) for name in args.runs]
    path = Path(args.output) if args.output else folders[0].path / "report.html"
    _write(path, render_report(folders, now=datetime.now().astimezone()))
    print(f"the page is {path}")
    return 0


def _write(path: Path, text: str) -> None:
    """In one move: a browser that shows the page of a run that goes on may read it at any time."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
