"""Self-contained HTML pages and their parts: no scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

PACKAGE = "megatrain.report"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> Markup:
    """Returns a template of `templates/` as HTML; values that are not Markup are escaped."""
    return Markup(_environment().get_template(f"{template}.html.jinja").render(**values))


def render_page(title: str, template: str = "page", **values: Any) -> str:
    """Returns a complete page; the template `page` shows the HTML `body`."""
    style = Markup(resources.files(PACKAGE).joinpath("style.css").read_text(encoding="utf-8"))
    return str(render(template, title=title, style=style, **values)) + "\n"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    has_total: bool = False,
    left: Sequence[int] = (),
) -> Markup:
    """Returns a table; columns are aligned to the right, except the first and those in `left`."""
    return _part("table", heads, rows, left=left, has_total=has_total)


def key(colour: str, name: str) -> Markup:
    """Returns a coloured square and the name that it stands for."""
    return _part("key", colour, name)


def bars(lengths: Iterable[tuple[float, str]], *, total: float, width: float) -> Markup:
    """Returns bars of (length, colour) next to each other; negative lengths are left out.

    Args:
        total: the length that is drawn `width` pixels wide.
    """
    return _part("bars", lengths, total=total, width=width)


def _part(name: str, *arguments: Any, **options: Any) -> Markup:
    parts = _environment().get_template("parts.html.jinja").module
    return Markup(getattr(parts, name)(*arguments, **options))


def seconds(value: float) -> str:
    """Returns three digits with a suitable unit: 1.23 ms, 12.0 s."""
    number, unit = in_unit(value)
    return f"{number:.0f} {unit}" if abs(number) >= 100 or not number else f"{number:#.3g} {unit}"


def in_unit(value: float) -> tuple[float, str]:
    """Returns seconds in a suitable unit."""
    size = abs(value)
    if size >= 10:
        return value, "s"
    return (value * 1e3, "ms") if size >= 1e-3 or not size else (value * 1e6, "µs")


def size(number: float) -> str:
    """Returns bytes in MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
