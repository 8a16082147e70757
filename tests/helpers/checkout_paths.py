"""Where the checkout's files lie, said once, so that a test may move from folder to folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS, TOOLS, PACKAGE = ROOT / "configs", ROOT / "tools", ROOT / "megatrain"
