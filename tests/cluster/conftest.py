"""One Slurm cluster and one process that forks the ranks of jobs, for all tests of this folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from helpers.netns_slurm import Cluster, Missing, find_programs
from helpers.warm_ranks import WarmPython


@pytest.fixture(scope="session")
def programs():
    try:
        return find_programs(Path(tempfile.gettempdir()) / f"megatrain-slurm-{os.getuid()}")
    except Missing as reason:
        pytest.skip(f"no Slurm cluster can run on this machine: {reason}")


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
    """The program that replaces python in jobs."""
    python = WarmPython(tmp_path_factory.mktemp("warm"))
    try:
        python.start()
        yield python.program
    finally:
        python.stop()
