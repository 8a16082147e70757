"""Converts a model from one format into another, like `megatrain convert`.

python tools/convert_checkpoint.py runs/mine exported --dtype bf16
"""

from __future__ import annotations

import sys

from megatrain.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
