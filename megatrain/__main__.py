"""`python -m megatrain`: the command line of cli/main.py."""

from __future__ import annotations

import sys

from megatrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
