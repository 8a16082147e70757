"""Time and memory at large scale: `megatrain check` up to 4096 ranks, a sample index of 10T tokens.

    python benchmarks/scale.py [--folder FOLDER] [--documents N]

The index is opened and read as by data rank 4095 of 4096. There are two datasets of 5T tokens, with
full indices of N documents (20 bytes each) and sparse .bin files: the file system must support
files of 10 TB. Each figure is of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKENS, RANKS, LENGTH = 5_000_000_000_000, 4096, 8192
"""Tokens per dataset; data ranks; tokens per sample."""

CHECKS = {
    "gpt_1t on 3072 ranks": ["configs/gpt_1t.yaml", "--nodes", "384", "--gpus-per-node", "8"],
    "gpt_1t on 4096 ranks, tensor 8 x pipeline 64 x data 8": [
        "configs/gpt_1t.yaml",
        "parallel.data=8",
        "train.global_batch_size=4096",
        "--nodes",
        "512",
        "--gpus-per-node",
        "8",
    ],
    "gpt_1t on 4096 ranks, tensor 16 x pipeline 128 x data 2, zb-h1": [
        "configs/gpt_1t.yaml",
        "parallel.tensor=16",
        "parallel.pipeline=128",
        "parallel.data=2",
        "parallel.schedule=zb-h1",
        "--nodes",
        "512",
        "--gpus-per-node",
        "8",
    ],
    "llama3_70b on 64 ranks": ["configs/llama3_70b.yaml", "--nodes", "8", "--gpus-per-node", "8"],
    "demo_cpu on 4 ranks": ["configs/demo_cpu.yaml"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="for the datasets; removed afterwards (default: a temporary one)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=100_000_000,
        metavar="N",
        help="of each dataset (default: 1e8, an index of 2 GB)",
    )
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(Path(args.read[0]), masked=args.read[1] == "masked")
        return
    for name, arguments in CHECKS.items():
        show(
            f"check {name}",
            [sys.executable, "-m", "megatrain", "check", *arguments, "--gpu-memory", "80"],
        )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder), args.documents)
        for how in ("plain", "masked"):
            show(
                f"index, {2 * TOKENS / 1e12:.0f}T tokens, {2 * args.documents:.2g} "
                f"documents, {how}",
                [sys.executable, __file__, "--read", folder, how],
            )


def show(name: str, command: list[str]) -> None:
    """Prints seconds, CPU seconds and peak memory of a process, and the JSON lines it prints."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    lines = [line for line in process.stdout if line.startswith("{")]
    _, _, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"{name:<70}{seconds:>7.2f} s {cpu:>7.2f} s CPU {usage.ru_maxrss / 1024:>7.0f} MiB",
        *(line.strip() for line in lines),
        flush=True,
    )


def write(folder: Path, documents: int) -> None:
    """Writes two datasets of documents of one length: a complete index and an empty .bin file."""
    import numpy as np

    from megatrain.data.indexed_dataset import write_index

    for name in ("a", "b"):
        with (folder / f"{name}.idx").open("wb") as file:
            write_index(
                file,
                lengths=np.full(documents, TOKENS // documents, dtype=np.int32),
                dtype=np.dtype(np.uint16),
            )
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(TOKENS // documents * documents * 2)


def read(folder: Path, *, masked: bool) -> None:
    """Opens the data as the last data rank and reads steps of the whole run; prints the costs."""
    from megatrain.config.loader import Data
    from megatrain.data.dataloader import DataLoader
    from megatrain.data.gpt_dataset import open_dataset

    before, started = own_memory(), time.perf_counter()
    blend = [{"path": str(folder / "a"), "weight": 0.5}, {"path": str(folder / "b"), "weight": 0.5}]
    samples = open_dataset(
        Data(train=blend, document_mask=masked),
        part="train",
        sequence_length=LENGTH,
        seed=1,
        vocab_size=60_000,
    )
    loader = DataLoader(
        samples,
        global_batch_size=2 * RANKS,
        micro_batch_size=1,
        data_rank=RANKS - 1,
        data_size=RANKS,
    )
    opened = time.perf_counter() - started
    started, steps = time.perf_counter(), range(0, 150_000, 1_500)
    for step in steps:
        loader.microbatches(step)
    each = (time.perf_counter() - started) / len(steps)
    print(
        json.dumps(
            {
                "open_ms": round(1e3 * opened, 2),
                "step_ms": round(1e3 * each, 2),
                "own_mib": round((own_memory() - before) / 2**20, 1),
            }
        )
    )
    loader.close()


def own_memory() -> int:
    """Returns the resident memory without pages of files, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
