"""A model from one kind of folder into another; the same as `megatrain convert`.

    python tools/convert_checkpoint.py runs/mine exported --dtype bf16
"""

from __future__ import annotations

import argparse
import sys

from megatrain.errors import UserError
from megatrain.verbs.convert import add_arguments, run


def main() -> int:
    """Run the verb on the command line's arguments."""
    parser = argparse.ArgumentParser(description="Convert a checkpoint and prove it.")
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
