"""Checks the language and the size of the code: docstrings, comments, messages, functions, files.

    python tools/check_style.py [PATH ...]

Prints one line a finding and exits with 1 if there is one. The rules are in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("megatrain", "tests", "benchmarks", "tools")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 450
MAX_SENTENCE_WORDS = 25

REFUSED_OPENINGS = frozenset(
    [
        "What",
        "Of",
        "Whether",
        "Where",
        "As",
        "Those",
        "Which",
        "Whose",
        "When",
        "How",
        "If",
        "For",
        "By",
        "From",
        "In",
        "With",
        "That",
    ]
)
"""Openings that a docstring must not have: each begins an inverted or incomplete sentence."""

BANNED = re.compile(
    r"\b(afresh|mend(s|ed|ing)?|learnt|for ever|in its stead|thereof|whom|wish(es|ed)?"
    r"|stands? still|gets? on|got on|goes on|go on|went on|speaks?|spoken|tells?|told|voices?"
    r"|blame(s|d)?|paste|way out|ways out|x-?ray|verbs?|is worth|says so|is said|are said"
    r"|no whole checkpoint|whole checkpoints?|journal|misspelt|lays? over|laid over"
    r"|gives up|(?<!there )(is|are) no [a-z]+|at rest|a word|in words|let go|lets go"
    r"|culprit|lighter|glance|foresee|asked for no|knows? of|in vain|nothing is)\b",
    re.IGNORECASE,
)
"""Words that have a plain or a technical equivalent."""

_VERB = re.compile(r"[A-Z][a-z-]*s$")
_NOT_VERBS = frozenset(
    [
        "This",
        "Its",
        "Is",
        "Was",
        "Has",
        "As",
        "Tokens",
        "Ranks",
        "Steps",
        "Rows",
        "Always",
        "Plus",
        "Names",
    ]
)
_DRAWING = re.compile(r"^\s*\d+ {2}.*$", re.MULTILINE)
"""A line of a drawing of a schedule: `0  F0 F1 ...`."""
_SENTENCE_END = re.compile(r"(?<=[.;:?!])\s+|\n\s*\n|\n\s*[-*|]\s|\n(?=\s{4})")


def main(arguments: list[str]) -> int:
    """Prints all findings; returns the exit status."""
    roots = [Path(argument).resolve() for argument in arguments] or [ROOT / f for f in FOLDERS]
    files = sorted(
        file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py"))
    )
    findings = [finding for file in files for finding in check_file(file)]
    print("\n".join(findings) if findings else f"{len(files)} files: no findings")
    return 1 if findings else 0


def check_file(path: Path) -> list[str]:
    """Returns the findings of one Python file, as `path:line: message`."""
    source = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    is_test = "tests" in name.parts
    found = [*_size(source), *_docstrings(source, is_test), *_words(source, path)]
    return [f"{name}:{line}: {message}" for line, message in sorted(found)]


Finding = tuple[int, str]


def _size(source: str) -> Iterator[Finding]:
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        yield 1, f"the file has {lines} lines; at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - _docstring_lines(node)
            if length > MAX_FUNCTION_LINES:
                yield (
                    node.lineno,
                    f"`{node.name}` has {length} lines; at most {MAX_FUNCTION_LINES}",
                )


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the lines of the docstring: Args, Returns and Raises do not make a function long."""
    if ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def _docstrings(source: str, is_test: bool) -> Iterator[Finding]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        line = node.body[0].lineno
        opening = text.split(maxsplit=1)[0].strip("`,.:;()")
        if opening in REFUSED_OPENINGS:
            yield line, f"the docstring opens with {opening!r}"
        elif _needs_verb(node, is_test) and not _is_verb(opening):
            yield line, f"the docstring opens with {opening!r}; a verb in the third person, please"
        yield from ((line, message) for message in _long_sentences(text))


def _needs_verb(node: ast.AST, is_test: bool) -> bool:
    """Returns True for functions, except properties and tests (`test_*`)."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    decorators = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
    if decorators & {"property", "cached_property", "functools.cached_property"}:
        return False
    if any("fixture" in decorator for decorator in decorators):
        return False
    return not (is_test and node.name.startswith("test_"))


def _is_verb(word: str) -> bool:
    return bool(_VERB.match(word)) and word not in _NOT_VERBS


def _long_sentences(text: str) -> Iterator[str]:
    text = _DRAWING.sub("", text)
    for sentence in _SENTENCE_END.split(text):
        plain = re.sub(r"`[^`]*`", "x", sentence)
        words = [word for word in plain.split() if re.search(r"[A-Za-z]", word)]
        if len(words) > MAX_SENTENCE_WORDS:
            start = " ".join(sentence.split()[:6])
            yield f"a sentence of {len(words)} words, at most {MAX_SENTENCE_WORDS}: {start} ..."


def _words(source: str, path: Path) -> Iterator[Finding]:
    if path in (Path(__file__).resolve(), ROOT / "tests" / "test_style.py"):  # lists the words
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_data = token.type == tokenize.STRING and " " not in token.string  # a name, not prose
        if token.type in (tokenize.STRING, tokenize.COMMENT) and not is_data:
            for match in BANNED.finditer(token.string):
                line = token.start[0] + token.string.count("\n", 0, match.start())
                yield line, f"the word {match[0]!r}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
