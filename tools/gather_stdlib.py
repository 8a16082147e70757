"""Writes a small corpus as JSONL: the sources of Python's standard library.

python tools/gather_stdlib.py train.jsonl --valid valid.jsonl --valid-every 50 --without-held-out
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def part_of(path: str) -> Literal["train", "valid", "held-out"]:
    """Returns the part that the questions of a source belong to.

    The hash of the top-level module decides: one module in sixteen is held out, one is for
    validation. A leading underscore is ignored, so heapq and _heapq belong together.
    """
    module = path.partition("/")[0].removesuffix(".py").lstrip("_")
    number = hashlib.sha256(module.encode()).digest()[7] % 16
    return "held-out" if number == 0 else "valid" if number == 15 else "train"


def sources() -> Iterator[tuple[str, str]]:
    """Yields (path within the library, text) of every source that is not empty, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts) and (
            text := path.read_bytes().decode("utf-8", errors="replace")
        ):
            yield name.as_posix(), text


def main() -> int:
    """Writes one line per source file, every n-th into the second file."""
    parser = argparse.ArgumentParser(description="Python's standard library as JSONL.")
    parser.add_argument("output")
    parser.add_argument(
        "--max-mb", type=float, default=float("inf"), help="stop after this many MB of text"
    )
    parser.add_argument("--valid", metavar="OUTPUT", help="a second file, for every n-th source")
    parser.add_argument(
        "--valid-every", type=int, default=50, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--without-held-out",
        action="store_true",
        help="leave out the modules whose questions gather_docstrings.py holds out",
    )
    args = parser.parse_args()
    size = 0
    with ExitStack() as files:
        train = files.enter_context(open(args.output, "w", encoding="utf-8"))
        valid = files.enter_context(open(args.valid, "w", encoding="utf-8")) if args.valid else None
        chosen = (
            (path, text)
            for path, text in sources()
            if not (args.without_held_out and part_of(path) == "held-out")
        )
        for number, (path, text) in enumerate(chosen, start=1):
            size += len(text.encode())
            if size > args.max_mb * 1e6:
                break
            file = valid if valid is not None and number % args.valid_every == 0 else train
            file.write(json.dumps({"text": text, "path": path}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
