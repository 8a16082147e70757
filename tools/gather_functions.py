"""Writes a small classification task: the package of a function of Python's standard library.

    python tools/gather_functions.py train.jsonl --valid valid.jsonl

A record contains the source of a function and the name of its package. All packages have the same
number of functions, so one guess in eight is right.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from gather_stdlib import sources

PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)


def functions(text: str) -> Iterator[str]:
    """Yields the source of each function and method of a module that has at least four lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno is not None
            and node.end_lineno - node.lineno >= 3
        ):
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))


def by_package() -> dict[str, list[str]]:
    """Returns the distinct functions of each package, shuffled in a fixed order."""
    found: dict[str, dict[str, None]] = {package: {} for package in PACKAGES}
    for path, text in sources():
        package = Path(path).parts[0]
        if package in found:
            found[package] |= dict.fromkeys(functions(text))
    shuffled = {package: list(texts) for package, texts in found.items() if texts}
    for package, texts in shuffled.items():
        random.Random(package).shuffle(texts)
    return shuffled


def main() -> int:
    """Writes the same number of functions of each package, every fifth into the second file."""
    parser = argparse.ArgumentParser(
        description="Functions of the standard library with their packages, as JSONL."
    )
    parser.add_argument("output")
    parser.add_argument(
        "--valid", metavar="OUTPUT", required=True, help="a second file, for every fifth function"
    )
    args = parser.parse_args()
    found = by_package()
    count = min(len(texts) for texts in found.values())
    records = [
        {"text": texts[number], "label": package}
        for number in range(count)
        for package, texts in found.items()
    ]
    held_out = [number // len(found) % 5 == 0 for number in range(len(records))]
    for name, wanted in ((args.output, False), (args.valid, True)):
        lines = [
            json.dumps(record) + "\n"
            for record, held in zip(records, held_out, strict=True)
            if held is wanted
        ]
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("".join(lines), encoding="utf-8")
    print(f"{len(found)} packages, {count} functions of each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
