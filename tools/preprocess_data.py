"""Text files to PREFIX.bin and PREFIX.idx; the same as `megatrain preprocess`.

    python tools/preprocess_data.py corpus.jsonl --tokenizer tokenizer --output data/corpus
"""

from __future__ import annotations

import argparse
import sys

from megatrain.errors import UserError
from megatrain.verbs.preprocess import add_arguments, run


def main() -> int:
    """Run the verb on the command line's arguments."""
    parser = argparse.ArgumentParser(description="Text files to an indexed data set.")
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
