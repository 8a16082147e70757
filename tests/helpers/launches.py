"""Starts what launch_scenarios.py holds, as a shell starts a launcher, and sees how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatrain.telemetry import events

LONG = 300
"""Seconds that nothing here takes, on a machine however busy."""


class Launched:
    """A launch under way in its own process, and what it has written."""

    def __init__(self, server, folder, pid, world_size):
        self.server, self.folder, self.pid, self.world_size = server, folder, pid, world_size

    def wait(self):
        return ask(self.server, {"wait": self.pid})

    def rank_pids(self):
        """The process of each rank, once all are in their target."""
        files = [self.folder / f"up-{rank}" for rank in range(self.world_size)]
        until(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    def text(self, name):
        return (self.folder / name).read_text()

    def events(self, name):
        return [event for event in events.read(self.folder) if event.event == name]

    def log(self, rank):
        return self.text(f"logs/rank-{rank:05d}.log")

    def lines(self, rank):
        """Of the rank's log for programs."""
        return [json.loads(line) for line in self.text(f"logs/rank-{rank:05d}.jsonl").splitlines()]


def ask(server, order):
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def until(true, *, seconds=LONG):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s for it"
        time.sleep(0.02)


def runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def signalled(pid):
    """Whether it has ended; otherwise it is sent another SIGTERM."""
    if runs(pid):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    return not runs(pid)


@pytest.fixture(scope="session")
def extensions(tmp_path_factory):
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(scope="session")
def server(extensions):
    outside = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMP_", "RANK"))
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.launch_scenarios"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **outside,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TORCH_EXTENSIONS_DIR": str(extensions),
        },
    )
    yield process
    # It is told to end: ranks that other tests have forked since hold the pipe too.
    process.stdin.write(json.dumps({"stop": True}) + "\n")
    process.stdin.flush()
    assert process.wait(timeout=LONG) == 0


@pytest.fixture
def launch(server, tmp_path):
    started = []

    def start(scenario, *, world_size=4, launcher="launch_locally", overrides=(), name="."):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        order = {
            "scenario": scenario,
            "folder": str(folder),
            "world_size": world_size,
            "launcher": launcher,
        }
        started.append(ask(server, {**order, "overrides": list(overrides)}))
        return Launched(server, folder, started[-1], world_size)

    yield start
    for pid in started:
        if runs(pid):
            os.killpg(pid, signal.SIGKILL)
