"""README.md and docs/ name what is there: files, links, verbs and settings; and the README's tree has every file."""

import re
import typing
from dataclasses import fields

import pytest
from helpers.checkout_paths import ROOT

from megatrain.cli.main import COMMANDS
from megatrain.config.schema import Config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {
    name: hint
    for name, hint in typing.get_type_hints(Config).items()
    if name not in ("model", "task")
}

ENDINGS = {"py", "json", "jsonl", "yaml", "bin", "idx", "md"}
"""What follows a dot in a file's name."""


def sources():
    """Of the package, from its root on."""
    return [
        path.relative_to(ROOT)
        for path in sorted((ROOT / "megatrain").rglob("*.py"))
        if path.name != "__init__.py"
    ]


def test_the_tree_has_every_file_and_no_other():
    readme = PAGES[0].read_text()
    tree = readme[readme.index("## The tree") : readme.index("Read these six first")]
    named = set(re.findall(r"[\w-]+\.py", tree))
    listed = {path.name for path in sources() if path.parent.name not in ("families", "verbs")}
    everything = {
        path.name
        for folder in ("megatrain", "benchmarks", "tools")
        for path in (ROOT / folder).rglob("*.py")
    }
    everything |= {path.name for path in (ROOT / "tests").glob("*.py")}
    assert listed - named == set()
    assert named - everything == set()
    verbs = re.search(r"verbs/ +([^:]*):", tree)[1].split(", ")
    assert verbs == [path.stem for path in sources() if path.parent.name == "verbs"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(
        r"(?<![\w/.-])(?:megatrain|tests|tools|configs|slurm|benchmarks|docs)/[\w./-]+\.(?:py|yaml|sh|md|jinja|png)\b",
        text,
    )
    assert [path for path in paths if not (ROOT / path).exists() and "MODEL_TYPE" not in path] == []
    verbs = re.findall(r"(?:^    |`)megatrain ([a-z]+)", text, re.MULTILINE)
    assert set(verbs) <= {*COMMANDS}
    settings = re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z_]+)\b(?![./(])", text)
    known = {(section, item.name) for section, hint in SECTIONS.items() for item in fields(hint)}
    assert {
        setting for setting in settings if setting not in known and setting[1] not in ENDINGS
    } == set()
