"""One Slurm cluster, and one process that jobs' ranks are forked from, for all tests of this folder."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.netns_slurm import Cluster, Missing, find_programs
from helpers.warm_ranks import WarmPython


@pytest.fixture(scope="session")
def programs():
    try:
        return find_programs(Path(tempfile.gettempdir()) / f"megatrain-slurm-{os.getuid()}")
    except Missing as reason:
        pytest.skip(f"no Slurm cluster can be made here: {reason}")


@pytest.fixture(scope="session")
def cluster(programs, tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), programs=programs)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def warm(programs, tmp_path_factory):
    """The program that stands in for python in jobs."""
    python = WarmPython(tmp_path_factory.mktemp("warm"))
    try:
        python.start()
        yield python.program
    finally:
        python.stop()
