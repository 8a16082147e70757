"""Writes the tree of files in docs/architecture.md from the docstrings of packages and modules.

    python tools/make_architecture.py [--check]

With --check it compares instead of writing, and exits with 1 if the page is out of date.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files: begin (tools/make_architecture.py) -->\n", "<!-- files: end -->\n"
ROOMS = [
    "config",
    "ops",
    "distributed",
    "data",
    "models",
    "pipeline",
    "optim",
    "checkpoint",
    "telemetry",
    "planner",
    "training",
    "launch",
    "evaluation",
    "conversion",
    "report",
    "cli",
]
"""The rooms of the package, from the lowest floor to the highest."""


def main(arguments: list[str]) -> int:
    """Writes or checks the page; returns the exit status."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}{make_tree()}{END}{after}"
    if "--check" in arguments:
        if new != page:
            print(f"{PAGE.relative_to(ROOT)} is out of date: run python tools/make_architecture.py")
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def make_tree() -> str:
    """Returns one section per room: its purpose, then each file with its purpose."""
    package = ROOT / "megatrain"
    lines = ["\n### megatrain/\n", *_files(package, package)]
    for room in ROOMS:
        folder = package / room
        lines += [
            f"\n### {room}/\n",
            f"{summary(folder / '__init__.py')}\n",
            *_files(folder, folder),
        ]
    lines += ["\n### tools/\n", *_files(ROOT / "tools", ROOT / "tools")]
    lines += ["\n### benchmarks/\n", *_files(ROOT / "benchmarks", ROOT / "benchmarks")]
    return "\n".join(lines) + "\n\n"


def _files(folder: Path, root: Path) -> list[str]:
    """Returns a line per file, with those of inner packages behind the folder's own."""
    own = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    lines = [f"- `{path.relative_to(root)}`: {summary(path)}" for path in own]
    if folder.parent != ROOT:
        for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
            names = ", ".join(f"`{path.stem}`" for path in sorted(inner.glob("[!_]*.py")))
            lines.append(
                f"- `{inner.relative_to(root)}/`: {summary(inner / '__init__.py')} ({names})"
            )
    return lines


def summary(path: Path) -> str:
    """Returns the first sentence of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[^.])\.(?:\s|$)", first)[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
