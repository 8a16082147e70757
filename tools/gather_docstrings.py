"""Gather questions and answers that every machine has: what the functions of Python's own standard library say of themselves.

    python tools/gather_docstrings.py train.jsonl --valid valid.jsonl --valid-every 20

A question is a function's signature, the answer its docstring's first sentence.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack

from gather_stdlib import sources

SHORTEST, LONGEST = 12, 240


def pairs() -> Iterator[tuple[str, str]]:
    """Yield (question, answer) of every function with a docstring, in the sources' order; no answer twice."""
    seen = set()
    for path, text in sources():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, function in functions(text, module):
            answer = first_sentence(ast.get_docstring(function) or "")
            if SHORTEST <= len(answer) <= LONGEST and answer not in seen:
                seen.add(answer)
                yield f"What does {name}({ast.unparse(function.args)}) do?", answer


def functions(text: str, module: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a source and of its classes, each with its full name."""
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
            yield from ((f"{module}.{node.name}.{inner.name}", inner) for inner in node.body if isinstance(inner, ast.FunctionDef))


def first_sentence(docstring: str) -> str:
    """The first paragraph up to its first full stop, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


def main() -> int:
    """Write one line for each function, every n-th into the second file."""
    parser = argparse.ArgumentParser(description="Questions and answers from Python's standard library as JSONL.")
    parser.add_argument("output")
    parser.add_argument("--valid", metavar="OUTPUT", help="a second file, for every n-th pair")
    parser.add_argument("--valid-every", type=int, default=20, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    with ExitStack() as files:
        train = files.enter_context(open(args.output, "w", encoding="utf-8"))
        valid = files.enter_context(open(args.valid, "w", encoding="utf-8")) if args.valid else None
        for number, (question, answer) in enumerate(pairs(), start=1):
            file = valid if valid is not None and number % args.valid_every == 0 else train
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
