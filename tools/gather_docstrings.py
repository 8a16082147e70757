"""Writes questions and answers from the docstrings of Python's standard library.

    python tools/gather_docstrings.py train.jsonl --valid valid.jsonl --held-out held_out.jsonl

A question is the signature of a function, the answer the first sentence of its docstring. All
questions of a module go to one file. The second file is for the choice of settings, the third for a
final test.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack

from gather_stdlib import part_of, sources

SHORTEST, LONGEST = 12, 240


def pairs() -> Iterator[tuple[str, str, str]]:
    """Yields (path, question, answer) of every function with a docstring; no answer twice."""
    seen = set()
    for path, text in sources():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, function in functions(text, module):
            answer = first_sentence(ast.get_docstring(function) or "")
            if SHORTEST <= len(answer) <= LONGEST and answer not in seen:
                seen.add(answer)
                yield path, f"What does {name}({ast.unparse(function.args)}) do?", answer


def functions(text: str, module: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yields the functions of a source and of its classes, each with its full name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield f"{module}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from (
                (f"{module}.{node.name}.{inner.name}", inner)
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            )


def first_sentence(docstring: str) -> str:
    """Returns the first paragraph up to its first full stop, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


def main() -> int:
    """Writes one line per function into the file of its module."""
    parser = argparse.ArgumentParser(
        description="Questions and answers from Python's standard library as JSONL."
    )
    parser.add_argument("output")
    parser.add_argument(
        "--valid", metavar="OUTPUT", required=True, help="a second file, for one module in sixteen"
    )
    parser.add_argument(
        "--held-out",
        metavar="OUTPUT",
        required=True,
        help="a third file, for one module in sixteen",
    )
    args = parser.parse_args()
    with ExitStack() as files:
        names = {"train": args.output, "valid": args.valid, "held-out": args.held_out}
        outputs = {
            part: files.enter_context(open(name, "w", encoding="utf-8"))
            for part, name in names.items()
        }
        for path, question, answer in pairs():
            outputs[part_of(path)].write(
                json.dumps({"prompt": question, "completion": answer}) + "\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
