"""Entry point for launchers, which start a file: the command `megatrain pretrain`.

torchrun --nproc-per-node 8 megatrain/pretrain.py CONFIG [section.key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the folder of a script first on the path, where the names of our modules would
    # hide others. The checkout, its parent, belongs there instead.
    _package = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _package]
    if str(_package.parent) not in sys.path:
        sys.path.insert(0, str(_package.parent))

    from megatrain.__main__ import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))
