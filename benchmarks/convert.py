"""Compares `megatrain convert` with `cp` of the same bytes on one disk, and measures its memory.

    python benchmarks/convert.py [--folder DIR] [--laps 3]

The model has 1.1e9 parameters in bf16; temporary files take 7 GB.

Each lap runs, in turn: `cp`; `cp` and `sync`; a conversion without verification; one with it. A
conversion waits for the disk. Verification reads everything back, compares and hashes it, and
computes logits of source and target. CPU seconds are printed too, because other load on the machine
slows computation more than waiting for a disk. The benchmark asserts no limits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from megatrain.conversion import writer
from megatrain.conversion.convert import convert
from megatrain.conversion.writer import plan_shards, write_model
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.counts import parameter_shapes

MODEL = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


class RandomModel:
    """Normal weights in bf16; each tensor is created when it is read."""

    def __init__(self, shapes):
        self.shapes, self._last = shapes, ("", torch.empty(0))

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return torch.bfloat16

    def read(self, name, index=None):
        if self._last[0] != name:
            self._last = (
                name,
                torch.ones(self.shapes[name])
                if len(self.shapes[name]) == 1
                else torch.empty(self.shapes[name]).normal_(0, 0.02),
            )
        return self._last[1][index or ()].bfloat16()


def make_model(folder, fields=MODEL):
    """Writes a folder of the model as transformers does; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    config = load_hf_config(fields)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    shapes = parameter_shapes(read_config(config))
    tensors = RandomModel(shapes)
    write_model(
        folder, plan_shards(shapes, tensors, 5 * 10**9), tensors, on_write=lambda count: None
    )
    return sum(writer.nbytes(tensors, name) for name in shapes)


class Cost(NamedTuple):
    """Seconds of one lap, and CPU seconds of this process and its children."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), _cpu()
    work()
    return Cost(time.perf_counter() - wall, _cpu() - cpu)


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_memory(words: list[str]) -> tuple[float, str]:
    """Returns the peak memory of a conversion in its own process, in GiB, and its output."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatrain", "convert", *words], stdout=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        output.seek(0)
        return usage.ru_maxrss / 2**20, output.read()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the temporary one)"
    )
    parser.add_argument("--laps", type=int, default=3, help="of times; 0 measures memory alone")
    parser.add_argument("--no-memory", action="store_true", help="measure times alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.folder) as name:
        root = Path(name)
        source, target = root / "model", root / "target"
        size = make_model(source)
        print(
            f"{size / 1e9:.2f} GB of tensors, {os.cpu_count()} cores, torch {torch.__version__}",
            flush=True,
        )
        contestants = {
            "cp": lambda: subprocess.run(["cp", "-r", source, target], check=True),
            "cp and sync": lambda: subprocess.run(
                f"cp -r {source} {target} && sync {target}/*", shell=True, check=True
            ),
            "convert, no proof": lambda: convert(source, target, to="hf", verify=False),
            "convert": lambda: convert(source, target, to="hf"),
        }
        seconds: dict[str, list[Cost]] = {name: [] for name in contestants}
        warm_up(root / "small")
        for lap in range(1, args.laps + 1):
            for name, work in contestants.items():
                os.sync()
                cost = timed(work)
                shutil.rmtree(target)
                seconds[name].append(cost)
                print(
                    f"  lap {lap}  {name:20} {cost.wall:7.2f} s  {cost.cpu:6.2f} s of CPU",
                    flush=True,
                )
        report(seconds, size)
        if not args.no_memory:
            report_memory(source, target)
    return 0


def warm_up(root):
    """Imports everything that a conversion needs."""
    make_model(
        root / "model", {**MODEL, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
    )
    convert(root / "model", root / "target", to="hf")


def report(seconds: dict[str, list[Cost]], size: int) -> None:
    """Prints medians, and the median over laps of the ratios."""
    if not all(seconds.values()):
        return
    for name, costs in seconds.items():
        wall, cpu = median(cost.wall for cost in costs), median(cost.cpu for cost in costs)
        print(f"{name:20} {wall:7.2f} s  {size / 1e6 / wall:7.0f} MB/s  {cpu:6.2f} s of CPU")
    for over in ("cp", "cp and sync"):
        for under in ("convert, no proof", "convert"):
            rates = [a.wall / b.wall for a, b in zip(seconds[over], seconds[under], strict=True)]
            print(f"speed of {under} over {over}: {median(rates):.2f}", flush=True)


def report_memory(source: Path, target: Path) -> None:
    """Prints the measured and the predicted memory of each kind of conversion."""
    for words in (
        ["--to", "hf", "--no-verify"],
        ["--to", "hf"],
        ["--to", "hf", "--dtype", "fp16"],
        ["--to", "checkpoint"],
    ):
        memory, output = peak_memory([str(source), str(target), *words])
        predicted = next(line.strip() for line in output.splitlines() if "memory" in line)
        proof = json.loads((target / "conversion.json").read_text())["proof"]
        shutil.rmtree(target)
        found = "" if proof is None else f"; logits differ by {proof['max_logit_difference']:.3g}"
        print(
            f"convert {' '.join(words)}: {memory:.2f} GiB; predicted: {predicted}{found}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
