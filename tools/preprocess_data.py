"""Writes PREFIX.bin and PREFIX.idx from text files, like `megatrain preprocess`.

python tools/preprocess_data.py corpus.jsonl --tokenizer tokenizer --output data/corpus
"""

from __future__ import annotations

import sys

from megatrain.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
