"""Compares the data pipeline with Megatron-LM's and with the tokenizer alone.

    pip install --no-deps megatron-core==0.16.1
    python benchmarks/data.py                               # 1e9 tokens in 2e6 documents, 2 GB
    python benchmarks/data.py --tokens 1e8 --text-mb 4      # smaller

Each lap measures each contestant once, so that other load on the machine affects all alike. Medians
and the median over laps of the ratios are printed. The benchmark asserts no limits.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from typing import Any, NamedTuple

SEQUENCE_LENGTH = 2048
VOCAB_SIZE = 50_000
MICROBATCH = 8


class Cost(NamedTuple):
    """The time of one lap."""

    wall: float  # seconds
    cpu: float  # seconds of this process and its finished children


def measure(work: Callable[[], Any]) -> Cost:
    """Calls `work` once and returns its time."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    work()
    return Cost(time.perf_counter() - wall, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def interleave(contestants: dict[str, Callable[[], Any]], *, laps: int) -> dict[str, list[Cost]]:
    """Measures all contestants in each lap, in turn; the first, with its imports, is dropped."""
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    for lap in range(laps + 1):
        for name, work in contestants.items():
            cost = measure(work)
            if lap:
                costs[name].append(cost)
    return costs


def ratio(over: list[Cost], under: list[Cost], *, by: str = "wall") -> float:
    """Returns the median over laps of one contestant's time over another's."""
    return median(getattr(a, by) / getattr(b, by) for a, b in zip(over, under, strict=True))


def write_dataset(prefix: Path, *, num_tokens: int) -> None:
    """Writes random tokens in documents of lognormal length, on average 500 tokens."""
    import numpy as np

    from megatrain.data.indexed_dataset import write_index

    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(5.7, 1.0, size=max(num_tokens // 500, 10)), 1).astype(
        np.int32
    )
    left = int(lengths.sum(dtype=np.int64))
    with open(f"{prefix}.bin", "wb") as file:
        while left:
            some = min(left, 1 << 24)
            file.write(rng.integers(0, VOCAB_SIZE, size=some, dtype=np.uint16).data)
            left -= some
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, lengths=lengths, dtype=np.dtype(np.uint16))


def open_ours(prefix: Path, *, document_mask: bool = False) -> Any:
    """Opens a dataset of samples."""
    from megatrain.data.gpt_dataset import GPTDataset
    from megatrain.data.indexed_dataset import IndexedDataset

    return GPTDataset(
        IndexedDataset(prefix),
        sequence_length=SEQUENCE_LENGTH,
        seed=1234,
        vocab_size=VOCAB_SIZE,
        document_mask=document_mask,
    )


def open_theirs(prefix: Path, cache: Path) -> Any:
    """Opens the same data with Megatron's GPTDataset: one epoch, no masks, index in `cache`."""
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Vocabulary:  # the attributes that GPTDataset reads
        vocab_size, eod, pad, unique_identifiers = VOCAB_SIZE, 0, 0, {"class": "random"}

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE_LENGTH,
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Vocabulary(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        blend=([str(prefix)], None),
    )
    dataset = IndexedDataset(str(prefix))
    documents = np.arange(len(dataset.document_indices) - 1, dtype=np.int32)
    return GPTDataset(dataset, str(prefix), documents, None, Split.train, config)


def compare_opening(prefix: Path, cache: Path, *, laps: int) -> None:
    """Prints the time until the first sample can be read."""

    def cold() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        open_theirs(prefix, cache)

    contestants = {
        "ours": lambda: open_ours(prefix),
        "GPTDataset, index to build": cold,
        "GPTDataset, index on disk": lambda: open_theirs(prefix, cache),
    }
    costs = interleave(contestants, laps=laps)
    print("\nopening and index, median seconds")
    for name, some in costs.items():
        against = ratio(costs["ours"], some)
        print(
            f"  {name:32} {median(cost.wall for cost in some):10.5f}   ours / this {against:8.4f}"
        )


def compare_fetching(prefix: Path, cache: Path | None, *, laps: int, count: int) -> None:
    """Prints samples per second, single and in microbatches; without `cache` only ours."""
    import torch
    from torch.utils.data import default_collate

    from megatrain.data.dataloader import DataLoader

    ours, masked = open_ours(prefix), open_ours(prefix, document_mask=True)
    theirs = open_theirs(prefix, cache) if cache else None
    num_samples = (
        min(ours.samples_per_epoch, len(theirs) if theirs else ours.samples_per_epoch) - MICROBATCH
    )
    loader = DataLoader(
        ours, global_batch_size=MICROBATCH, micro_batch_size=MICROBATCH, data_rank=0, data_size=1
    )
    torch.set_num_threads(1)
    cursor = {"one": 0}

    def positions() -> range:
        # New positions each time, so that neither contestant reads pages that were just read.
        first = cursor["one"]
        cursor["one"] = (first + count) % max(num_samples - count, 1)
        return range(first, min(first + count, num_samples))

    def ours_one(source: Any) -> None:
        for position in positions():
            source.fetch(position)

    def ours_batches() -> None:
        steps = positions()
        for step in range(steps.start // MICROBATCH, steps.stop // MICROBATCH):
            loader.microbatches(step)

    def theirs_one() -> None:
        for position in positions():
            theirs[position]

    def theirs_batches() -> None:
        some = positions()
        for first in range(some.start, some.stop - MICROBATCH + 1, MICROBATCH):
            default_collate([theirs[position] for position in range(first, first + MICROBATCH)])

    contestants = {
        "one by one, ours": lambda: ours_one(ours),
        "one by one, ours, document mask": lambda: ours_one(masked),
        f"microbatches of {MICROBATCH}, ours": ours_batches,
    }
    if theirs:
        contestants |= {"one by one, GPTDataset": theirs_one}
        contestants |= {f"microbatches of {MICROBATCH}, GPTDataset + collate": theirs_batches}
    costs = interleave(contestants, laps=laps)
    loader.close()
    _print_fetching(costs, count=count)


def _print_fetching(costs: dict[str, list[Cost]], *, count: int) -> None:
    print(f"\nsamples of {SEQUENCE_LENGTH} tokens, median samples/s")
    for name, some in costs.items():
        peer = next(
            (other for other in costs if "GPT" in other and other.startswith(name.split(",")[0])),
            None,
        )
        against = (
            f"   this / GPTDataset {ratio(costs[peer], some):6.2f}" if peer and peer != name else ""
        )
        print(f"  {name:44} {median(count / cost.wall for cost in some):10.0f}{against}")


def compare_preprocessing(folder: Path, *, laps: int, text_mb: float) -> None:
    """Prints MB of text per second and per CPU second; compares encode_batch on texts in memory."""
    from tokenizers import Tokenizer

    from megatrain.data.preprocess import preprocess
    from megatrain.data.tokenizer import train_tokenizer

    corpus = folder / "stdlib.jsonl"
    gather = Path(__file__).parents[1] / "tools" / "gather_stdlib.py"
    subprocess.run([sys.executable, gather, corpus, "--max-mb", str(text_mb)], check=True)
    train_tokenizer([corpus], vocab_size=8192, output=folder / "tokenizer")
    texts = [json.loads(line)["text"] for line in corpus.open()]
    size = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    cores = len(os.sched_getaffinity(0))

    def raw() -> None:
        for first in range(0, len(texts), 64):
            tokenizer.encode_batch_fast(texts[first : first + 64], add_special_tokens=False)

    def ours(workers: int) -> None:
        preprocess([corpus], tokenizer=folder / "tokenizer", output=folder / "out", workers=workers)

    bare, all_cores = f"encode_batch_fast, {cores} threads", f"ours, {cores} processes"
    costs = interleave(
        {bare: raw, all_cores: lambda: ours(cores), "ours, 1 process": lambda: ours(1)}, laps=laps
    )
    print(f"\npreprocessing {size:.1f} MB of text, start-up of the processes included, medians")
    for name, some in costs.items():
        wall, cpu = (
            median(size / cost.wall for cost in some),
            median(size / cost.cpu for cost in some),
        )
        print(
            f"  {name:32} {wall:6.2f} MB/s   {cpu:6.2f} MB/CPU-s   this / bare "
            f"{ratio(costs[bare], some):5.2f} in time, "
            f"{ratio(costs[bare], some, by='cpu'):5.2f} in CPU time"
        )


def main() -> None:
    """Runs the three comparisons."""
    parser = argparse.ArgumentParser(description="Compares the data pipeline with Megatron-LM's.")
    parser.add_argument(
        "--tokens", type=float, default=1e9, help="tokens of the generated data set"
    )
    parser.add_argument(
        "--text-mb", type=float, default=32, help="MB of text to preprocess, at most"
    )
    parser.add_argument("--samples", type=int, default=4000, help="samples in a lap")
    parser.add_argument("--laps", type=int, default=5)
    args = parser.parse_args()
    has_megatron = importlib.util.find_spec("megatron") is not None
    with tempfile.TemporaryDirectory(prefix="megatrain-benchmark-") as name:
        folder = Path(name)
        write_dataset(folder / "data", num_tokens=int(args.tokens))
        if has_megatron:
            compare_opening(folder / "data", folder / "cache", laps=args.laps)
        else:
            print("Megatron-LM is not installed (pip install --no-deps megatron-core==0.16.1)")
        cache = folder / "cache" if has_megatron else None
        compare_fetching(folder / "data", cache, laps=args.laps, count=args.samples)
        compare_preprocessing(folder, laps=args.laps, text_mb=args.text_mb)


if __name__ == "__main__":
    main()
