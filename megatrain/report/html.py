"""Parts of HTML pages that need nothing from elsewhere: no script, no font, no picture, light or dark as the reader's system is.

Text that is given to a function is text, unless it says HTML: then it is put in as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #111; --ground: #fff; --soft: #595959; --rule: #bbb; --notice: #eef5fa; --blue: #0072b2; --slow: #a03c00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --ground: #15171a; --soft: #a0a4aa; --rule: #4a4f55; --notice: #1b2a35; --blue: #56b4e9; --slow: #ff9d5c; }
}
body { font: 15px/1.45 Helvetica, Arial, sans-serif; color: var(--ink); background: var(--ground); margin: 28px auto; max-width: 1280px; padding: 0 24px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 32px 0 8px; } p { margin: 6px 0; max-width: 900px; }
.facts { max-width: none; } .facts, .small { color: var(--soft); } .small { font-size: 13px; }
.advice { border-left: 5px solid var(--blue); background: var(--notice); padding: 10px 16px; margin: 18px 0; }
.advice p { margin: 4px 0; max-width: none; } .advice code { background: var(--ground); padding: 1px 5px; white-space: nowrap; }
.wide { overflow-x: auto; } svg { display: block; } svg text { fill: currentColor; } svg g text { fill: #111; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { padding: 4px 14px 4px 0; text-align: right; } td { white-space: nowrap; }
th { font-weight: normal; color: var(--soft); border-bottom: 1px solid var(--rule); vertical-align: bottom; }
td:first-child, th:first-child, .left { text-align: left; } tr.all td { border-top: 1px solid var(--rule); font-weight: bold; }
.key { display: inline-block; width: 12px; height: 12px; margin-right: 5px; }
dt { font-weight: bold; margin-top: 6px; } dd { margin: 0 0 0 16px; max-width: 880px; }
.bar { display: inline-block; height: 11px; } .slow { font-weight: bold; color: var(--slow); }
@media (max-width: 600px) { body { margin: 14px auto; padding: 0 12px; } .advice code { white-space: normal; } }
"""


def frame(title: str, body: Iterable[str], *, style: str = "") -> str:
    """A whole page of HTML parts; `style` is laid over the common one."""
    head = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{style}</style></head><body>",
    ]
    return "\n".join([*head, *body, "</body></html>"]) + "\n"


def table(
    heads: list[str],
    rows: list[list[str]],
    *,
    last_is_whole: bool = False,
    left: tuple[int, ...] = (),
    kind: str = "",
) -> list[str]:
    """Cells are HTML; columns are set to the right but for the first and those in `left`. `kind` is a class for the style."""

    def line(cells: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=left' if column in left else ''}>{cell}</{tag}>"
            for column, cell in enumerate(cells)
        )

    lines = [
        f"<tr{' class=all' if last_is_whole and row is rows[-1] else ''}>{line(row, 'td')}</tr>"
        for row in rows
    ]
    return [
        f'<div class="wide {kind}"><table>' if kind else '<div class="wide"><table>',
        f"<tr>{line(heads, 'th')}</tr>",
        *lines,
        "</table></div>",
    ]


def key(colour: str, name: str) -> str:
    """A square of a colour and what it stands for; it is not parted from the first word."""
    first, *others = escape(name).split(" ")
    return " ".join(
        [
            f'<span style="white-space:nowrap"><span class="key" style="background:{colour}"></span>{first}</span>',
            *others,
        ]
    )


def bars(lengths: Iterable[tuple[float, str]], *, whole: float, width: float) -> str:
    """Bars of (length, colour) beside each other, `whole` of which are `width` pixels long; what is negative is left out."""
    drawn = (
        f'<span class="bar" style="width:{width * max(length, 0.0) / whole:.1f}px;background:{colour}"></span>'
        for length, colour in lengths
    )
    return f'<span style="white-space:nowrap">{"".join(drawn)}</span>'


def seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    number, unit = in_unit(value)
    return f"{number:.0f} {unit}" if abs(number) >= 100 or not number else f"{number:#.3g} {unit}"


def in_unit(value: float) -> tuple[float, str]:
    """Seconds in the unit that suits."""
    size = abs(value)
    return (
        (value, "s")
        if size >= 10
        else (value * 1e3, "ms")
        if size >= 1e-3 or not size
        else (value * 1e6, "µs")
    )


def size(number: float) -> str:
    """Bytes."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
