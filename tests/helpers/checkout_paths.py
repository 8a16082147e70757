"""Paths of the checkout, so that tests do not depend on their own folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS, TOOLS, PACKAGE = ROOT / "configs", ROOT / "tools", ROOT / "megatrain"
