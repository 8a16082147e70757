"""A rank's heap keeps what it frees, and lies in large pages where the system has them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import torch
from megatrain.distributed.huge_pages import use_huge_pages
if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
if sys.argv[1] != "without":
    use_huge_pages(2 << 30)

def step():
    tensors = [torch.ones(12 << 20) for _ in range(3)]  # 48 MiB each: more than glibc ever keeps by itself
    return sum(float(x[-1]) for x in tensors)

step()
before = resource.getrusage(resource.RUSAGE_SELF)
for _ in range(4):
    step()
after = resource.getrusage(resource.RUSAGE_SELF)
large = [line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
print(after.ru_minflt - before.ru_minflt, int(large[0].split()[1]) if large else 0)
"""


def faults_and_large_pages(how: str) -> tuple[int, int]:
    """Pages touched anew in four steps, and KiB in large pages afterwards."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    ).stdout
    return tuple(map(int, found.split()))


PAGES = 4 * 3 * (48 << 20) // resource.getpagesize()

on_request = pytest.mark.skipif(
    not (SETTING := Path("/sys/kernel/mm/transparent_hugepage/enabled")).is_file()
    or "[madvise]" not in SETTING.read_text(),
    reason="the system gives no large pages, or always",
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages of Linux")
def test_what_is_freed_is_kept():
    faults, _ = faults_and_large_pages("with")
    assert faults < PAGES / 100


@on_request
def test_it_lies_in_large_pages():
    assert faults_and_large_pages("with")[1] >= 3 * 48 << 10


@on_request
@pytest.mark.parametrize("how", ["without", "limited"])
def test_where_addresses_are_limited_nothing_changes(how):
    faults, large = faults_and_large_pages(how)
    assert faults > PAGES / 2
    assert large == 0
