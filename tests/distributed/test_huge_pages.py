"""A rank's heap keeps freed memory, in huge pages where the system has them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import torch
from megatrain.distributed.device import use_huge_pages
if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
if sys.argv[1] != "without":
    use_huge_pages(2 << 30)

def step():
    tensors = [torch.ones(12 << 20) for _ in range(3)]  # 48 MiB: glibc returns such blocks
    return sum(float(x[-1]) for x in tensors)

step()
before = resource.getrusage(resource.RUSAGE_SELF)
for _ in range(4):
    step()
after = resource.getrusage(resource.RUSAGE_SELF)
large = [line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
print(after.ru_minflt - before.ru_minflt, int(large[0].split()[1]) if large else 0)
"""


def faults_and_huge_pages(how: str) -> tuple[int, int]:
    """Returns the page faults of four steps, and the KiB in huge pages afterwards."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    ).stdout
    return tuple(map(int, found.split()))


PAGES = 4 * 3 * (48 << 20) // resource.getpagesize()

on_request = pytest.mark.skipif(
    not (SETTING := Path("/sys/kernel/mm/transparent_hugepage/enabled")).is_file()
    or "[madvise]" not in SETTING.read_text(),
    reason="requires huge pages on request (madvise)",
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="requires Linux")
def test_freed_memory_is_kept():
    faults, _ = faults_and_huge_pages("with")
    assert faults < PAGES / 100


@on_request
def test_heap_lies_in_huge_pages():
    assert faults_and_huge_pages("with")[1] >= 3 * 48 << 10


@on_request
@pytest.mark.parametrize("how", ["without", "limited"])
def test_limit_on_addresses_changes_nothing(how):
    faults, huge = faults_and_huge_pages(how)
    assert faults > PAGES / 2
    assert huge == 0
