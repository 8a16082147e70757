"""README.md and docs/ name existing files, commands and settings; generated pages are current."""

import re
import subprocess
import sys
import typing
from dataclasses import fields

import pytest
from helpers.checkout_paths import ROOT

from megatrain.cli.main import ALIASES, COMMANDS, RENAMED
from megatrain.config.schema import Config

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SECTIONS = {
    name: hint
    for name, hint in typing.get_type_hints(Config).items()
    if name not in ("model", "task")
}
EXTENSIONS = {"py", "json", "jsonl", "yaml", "bin", "idx", "md", "csv"}
PATH = re.compile(
    r"(?<![\w/.-])(?:megatrain|tests|tools|configs|slurm|benchmarks|docs)/[\w./-]+"
    r"\.(?:py|yaml|sh|md|jinja|png)\b"
)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_architecture_lists_every_file():
    command = [sys.executable, str(ROOT / "tools" / "make_architecture.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_paths_commands_and_settings_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = PATH.findall(text)
    assert [path for path in paths if not (ROOT / path).exists() and "MODEL_TYPE" not in path] == []
    commands = re.findall(r"(?:^    |`)megatrain ([a-z][a-z-]+)", text, re.MULTILINE)
    assert set(commands) <= {*COMMANDS, *ALIASES, *RENAMED}
    prose = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)  # attributes look like settings
    settings = re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z_]+)\b(?![./(])", prose)
    known = {(section, item.name) for section, hint in SECTIONS.items() for item in fields(hint)}
    unknown = {setting for setting in settings if setting not in known}
    assert {setting for setting in unknown if setting[1] not in EXTENSIONS} == set()
